#include "dataflex/cpu.h"
#ifdef DATAFLEX_X86
#include "loss_rows.h"
#endif
