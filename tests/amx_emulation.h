// AMX tiles in plain C++, with the instructions' names: the tile kernels run, slowly, on a CPU without tiles.
// Bounds are those of memory: AddressSanitizer sees every byte that a tile would touch.
#pragma once

#include <cstdint>
#include <cstring>

namespace amx_emulation {

// A row of a tile, of GCC's vectors: quick without optimisation too, as sanitised kernels are compiled.
using Words = uint32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));

struct Tile {
  Words row[16];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void need_configuration() {
  if (!configured) __builtin_trap();
}

inline void load(int tile, const void* base, int64_t stride) {
  need_configuration();
  for (int row = 0; row < 16; ++row)
    std::memcpy(&tiles[tile].row[row], static_cast<const char*>(base) + row * stride, 64);
}

inline void store(int tile, void* base, int64_t stride) {
  need_configuration();
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(base) + row * stride, &tiles[tile].row[row], 64);
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// C[i][j] += the two bfloat16 of A[i][k] times those of B[k][j], for all k.
inline void multiply(int c, int a, int b) {
  need_configuration();
  for (int i = 0; i < 16; ++i) {
    Floats sum = (Floats)tiles[c].row[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = tiles[a].row[i][k];
      const Words y = tiles[b].row[k];
      sum += as_float(x << 16) * (Floats)(y << 16);
      sum += as_float(x & 0xffff0000u) * (Floats)(y & 0xffff0000u);
    }
    tiles[c].row[i] = (Words)sum;
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config), amx_emulation::configured = true)
#define _tile_release() (amx_emulation::configured = false)
#define _tile_loadd(tile, base, stride) amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::store(tile, base, stride)
#define _tile_zero(tile) std::memset(&amx_emulation::tiles[tile], 0, sizeof(amx_emulation::Tile))
#define _tile_dpbf16ps(c, a, b) amx_emulation::multiply(c, a, b)
