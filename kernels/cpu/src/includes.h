// What every instruction set's file needs from outside. Included before its target is set, so that no function
// of the standard library is compiled for instructions that another machine may lack.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "abi.h"
#include "elements.h"
#include "memory.h"
#include "team.h"
