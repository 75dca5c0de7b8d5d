#include "loss_rows.h"
