// What the CUDA kernels of multi-scale deformable attention share: which query a thread serves, and where samples lie.

#pragma once

#include "msda.h"

#include "../cuda_common.h"

namespace querymask::msda {

constexpr int kThreads = 256; // of a block
constexpr int kTileWidth = 8; // queries
constexpr int kMaxLevels = 32;
constexpr unsigned kWarp = 0xffffffffu;

// The sizes of a call as kernels take them.
struct Geometry {
  int64_t B, S, Q;
  int M, D, L, P;
  int group; // threads of one query and head: a power of two, at most 32
  bool tiled; // whether the queries are the tokens, and a block serves a tile of them
  unsigned blocks; // for one head
  int height[kMaxLevels], width[kMaxLevels], token[kMaxLevels]; // token: of the first pixel
  unsigned first_tile[kMaxLevels + 1];
  int first_cell[kMaxLevels + 1]; // cells: between four tokens, or at the border (cuda_deterministic.h)
};

// The query that a group of a block serves, or -1.
__device__ inline int64_t query_of(const Geometry& geometry, unsigned block, int member, int members) {
  if (!geometry.tiled) {
    const int64_t query = static_cast<int64_t>(block) * members + member;
    return query < geometry.Q ? query : -1;
  }
  int level = 0;
  while (block >= geometry.first_tile[level + 1]) {
    ++level;
  }
  const unsigned tile = block - geometry.first_tile[level];
  const unsigned columns = (geometry.width[level] + kTileWidth - 1) / kTileWidth;
  const int x = tile % columns * kTileWidth + member % kTileWidth;
  const int y = tile / columns * (members / kTileWidth) + member / kTileWidth;
  const bool exists = x < geometry.width[level] && y < geometry.height[level];
  return exists ? geometry.token[level] + static_cast<int64_t>(y) * geometry.width[level] + x : -1;
}

// Where a sample lies on its level: its upper left neighbour, and how far it is from that one, in pixels.
template <typename C>
struct Place {
  int level, column, line; // column and line may be -1
  C x, y;
  bool inside; // whether any neighbour is inside the map

  __device__ bool left() const {
    return column >= 0;
  }
  __device__ bool right(const Geometry& geometry) const {
    return column + 1 < geometry.width[level];
  }
  __device__ bool upper() const {
    return line >= 0;
  }
  __device__ bool lower(const Geometry& geometry) const {
    return line + 1 < geometry.height[level];
  }
};

// Finds the sample with a number `index` among those of its query and head.
template <typename C>
__device__ Place<C> locate(const Geometry& geometry, const C* __restrict__ location, int index) {
  Place<C> place;
  place.level = geometry.P == 4 ? index / 4 : index / geometry.P; // a division by a variable takes 20 instructions
  const int height = geometry.height[place.level], width = geometry.width[place.level];
  const auto pair = *reinterpret_cast<const Vector<C, 2>*>(location);
  const C x = pair.values[0] * static_cast<C>(width) - C(0.5);
  const C y = pair.values[1] * static_cast<C>(height) - C(0.5);
  // False for NaN too, so that only numbers within the map are converted to integers.
  place.inside = x >= C(-1) && x < static_cast<C>(width) && y >= C(-1) && y < static_cast<C>(height);
  const C column = floor(x), line = floor(y);
  place.column = place.inside ? static_cast<int>(column) : 0;
  place.line = place.inside ? static_cast<int>(line) : 0;
  place.x = place.inside ? x - column : C(0);
  place.y = place.inside ? y - line : C(0);
  return place;
}

// What the threads of a group need of a sample: of the upper left, upper right, lower left and lower right neighbour
// the weight, and the token, counted from the image's first one, times a factor. A neighbour outside the map lends its
// place to the one inside beside it, and both take half of that one's weight: no load depends on a condition, and
// nothing that stands elsewhere in memory can turn a zero into NaN. Samples without any neighbour are left out.
template <typename C, typename Offset>
struct alignas(16) Sample {
  C weights[4];
  Offset offsets[4];
};

template <typename C, typename Offset>
__device__ Sample<C, Offset> make_sample(
    const Geometry& geometry,
    const Place<C>& place,
    C attention,
    Offset factor) {
  const bool left = place.left(), right = place.right(geometry), upper = place.upper(), lower = place.lower(geometry);
  const C by_x[2] = {
      left ? (right ? C(1) - place.x : C(0.5) * (C(1) - place.x)) : C(0.5) * place.x,
      right ? (left ? place.x : C(0.5) * place.x) : C(0.5) * (C(1) - place.x)};
  const C by_y[2] = {
      attention * (upper ? (lower ? C(1) - place.y : C(0.5) * (C(1) - place.y)) : C(0.5) * place.y),
      attention * (lower ? (upper ? place.y : C(0.5) * place.y) : C(0.5) * (C(1) - place.y))};
  const int width = geometry.width[place.level];
  const int column = left ? place.column : 0, line = upper ? place.line : 0;
  const Offset corner = (geometry.token[place.level] + line * width + column) * factor;
  const Offset to_right = left && right ? factor : 0;
  const Offset to_lower = upper && lower ? width * factor : 0;
  Sample<C, Offset> sample;
  sample.weights[0] = by_y[0] * by_x[0];
  sample.weights[1] = by_y[0] * by_x[1];
  sample.weights[2] = by_y[1] * by_x[0];
  sample.weights[3] = by_y[1] * by_x[1];
  sample.offsets[0] = corner;
  sample.offsets[1] = corner + to_right;
  sample.offsets[2] = corner + to_lower;
  sample.offsets[3] = corner + to_lower + to_right;
  return sample;
}

// How the threads of a group put those of their samples that are wanted side by side.
struct Turns {
  int mine; // number of this thread's sample among them
  int count; // of the group
};

// Called by the whole warp; lane: of the thread in its group.
__device__ inline Turns take_turns(bool wanted, int lane, int group) {
  const unsigned votes = __ballot_sync(kWarp, wanted) >> (threadIdx.x % 32 - lane) & kWarp >> (32 - group);
  return {__popc(votes & ((1u << lane) - 1)), __popc(votes)};
}

} // namespace querymask::msda
