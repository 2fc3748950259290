// x + gate * y and the adaptive LayerNorm of it: the loops of adaln.h with kGated.
#pragma once

#include "adaln.h"
