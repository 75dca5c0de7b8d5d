// Compiled for one instruction set: see dataflex/cpu.h.
#include "dataflex/cpu.h"
#include "project_kernel.h"
