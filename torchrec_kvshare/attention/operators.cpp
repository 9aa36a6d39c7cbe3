// Attention of jagged users on a CPU, softmax and SiLU, forward and backward. See
// attention/operators.py for meaning and arguments.
//
// A forward task is one head of up to 128 queries of one user. It loops over blocks of 64 rows of K/V
// and, for each block, over tiles of queries: the queries of a tile are the lanes of vectors, so that
// rows are read where they are, number by number, and a softmax needs no sums across lanes. A row's
// result depends only on that row and its keys, to the bit: tiles are padded with zeros, and every
// row is rescaled on its own.
// A backward task is one head of one user. It recomputes the scores.
// Running softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867). Backward: FlashAttention, Dao et
// al. 2022 (arXiv:2205.14135), appendix B.2.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kTile = 8;  // rows of a product of two vectors: their sums fill half of the registers
#else
constexpr int kLanes = 8;
constexpr int kTile = 4;
#endif
constexpr int kPair = 2 * kLanes;
constexpr int kGroup = 8;   // a multiple of kTile, and the rows of a product of one vector
constexpr int kBlock = 64;  // rows of K/V per block
constexpr int kTaskRows = 128;
constexpr int kFewColumns = 8;
constexpr float kUnseen = -1e30f;
constexpr float kSlack = 20.0f;  // a row is rescaled when a weight exceeds 2**20
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNoBias[kBlock] = {};
constexpr int64_t kMostNumbers = int64_t{1} << 40;  // in a tensor: sizes derived do not overflow
constexpr int64_t kNoTime = -1;                     // time of a row that gets no time bias

using Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = float;
using BitVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = uint32_t;
using IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = int32_t;

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
// The compiler drops a subtraction of zero; it would keep an addition.
inline Vec all(float value) { return value - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Adds lanes to those `step` away, then to those half as far, and so on.
template <size_t step, size_t... lane>
inline Vec fold(Vec value, std::index_sequence<lane...> lanes) {
  const BitVec partners = {static_cast<uint32_t>(lane ^ step)...};
  const Vec sums = value + __builtin_shuffle(value, partners);
  if constexpr (step > 1) return fold<step / 2>(sums, lanes);
  return sums;
}

inline float sum_of(Vec value) {
  return fold<kLanes / 2>(value, std::make_index_sequence<kLanes>())[0];
}

inline float highest_of(Vec value) {
  float highest = value[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = std::max(highest, value[lane]);
  return highest;
}

// 2**x, relative error 1.5e-7, exactly zero below -149; NaN stays NaN.
inline Vec exp2(Vec x) {
#ifdef __AVX512F__
  const Vec rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  x = x < -126.6f ? all(-126.6f) : x;
  // Adding 1.5 * 2**23 rounds the fraction away; the lowest bits are then the exponent of 2**x.
  const Vec shifted = (x - 0.5f) + (12582912.0f + 127.0f);
  const Vec rest = x - (shifted - (12582912.0f + 127.0f));
#endif
  // Minimax polynomial (relative error) for 2**rest on [0, 1], exactly 1 at 0.
  Vec power = all(1.867130213e-3f);
  power = power * rest + 9.017030019e-3f;
  power = power * rest + 5.579991332e-2f;
  power = power * rest + 2.401644501e-1f;
  power = power * rest + 6.931513118e-1f;
  power = power * rest + 1.0f;
#ifdef __AVX512F__
  return _mm512_scalef_ps(power, x);  // times 2**floor(x)
#else
  // A product, not an addition of exponent bits, so that a NaN with any bits stays NaN.
  return power * reinterpret_cast<Vec>(reinterpret_cast<BitVec>(shifted) << 23);
#endif
}

inline Vec sigmoid(Vec x) {
  const Vec power = x * -kLog2E;
  const Vec divisor = exp2(power > 126.0f ? all(126.0f) : power) + 1.0f;
#ifdef __AVX512F__
  // Reciprocal to 2**-14, then one Newton step: a third of the cost of a division.
  const Vec inverse = _mm512_rcp14_ps(divisor);
  return inverse * (2.0f - divisor * inverse);
#else
  return 1.0f / divisor;
#endif
}

inline float dot(const float* a, const float* b, int64_t dim) {
  Vec total{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) total += load(a + d) * load(b + d);
  float result = sum_of(total);
  for (; d < dim; ++d) result += a[d] * b[d];
  return result;
}

// to [count] += factor times from [count].
inline void add_scaled(const float* from, float factor, int64_t count, float* to) {
  for (int64_t d = 0; d < count; ++d) to[d] += factor * from[d];
}

// out [rows, vecs * kLanes] = start + left [rows, depth] times right [depth, vecs * kLanes]. start(row,
// vec) and left(row, step) are values, right(step) is a pointer.
template <int rows, int vecs, typename Start, typename Left, typename Right>
__attribute__((always_inline)) inline void multiply(int64_t depth, const Start& start,
                                                    const Left& left, const Right& right,
                                                    float* out, int64_t out_step) {
  Vec sums[rows][vecs];
  for (int row = 0; row < rows; ++row)
    for (int vec = 0; vec < vecs; ++vec) sums[row][vec] = start(row, vec);
  for (int64_t step = 0; step < depth; ++step) {
    const float* from = right(step);
    Vec columns[vecs];
    for (int vec = 0; vec < vecs; ++vec) columns[vec] = load(from + vec * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const Vec factor = all(left(row, step));
      for (int vec = 0; vec < vecs; ++vec) sums[row][vec] += factor * columns[vec];
    }
  }
  for (int row = 0; row < rows; ++row)
    for (int vec = 0; vec < vecs; ++vec) store(out + row * out_step + vec * kLanes, sums[row][vec]);
}

// sums [rows, columns] += left times right, for rows rounded up to a multiple of kGroup.
template <typename Left, typename Right>
inline void multiply_add(int64_t num_rows, int64_t depth, int64_t num_columns, const Left& left,
                         const Right& right, float* sums) {
  int64_t column = 0;
  const auto add = [&]<int rows, int vecs>() {
    for (int64_t first = 0; first < num_rows; first += rows) {
      float* to = sums + first * num_columns + column;
      multiply<rows, vecs>(
          depth, [=](int row, int vec) { return load(to + row * num_columns + vec * kLanes); },
          [&](int row, int64_t step) { return left(first + row, step); },
          [&](int64_t step) { return right(step) + column; }, to, num_columns);
    }
  };
  for (; column + kPair <= num_columns; column += kPair) add.template operator()<kTile, 2>();
  if (column < num_columns) add.template operator()<kGroup, 1>();
}

struct Sizes {
  int64_t num_heads, dim, padded_dim;
  Sizes(int64_t num_heads, int64_t dim)
      : num_heads(num_heads), dim(dim), padded_dim((dim + kLanes - 1) / kLanes * kLanes) {}
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
};

// Pages of rows, [P, S, H, D]; copied if the last dimension is not contiguous.
struct Pages {
  at::Tensor tensor;
  const float* data = nullptr;
  int64_t page_size = 1, page_stride = 0, row_stride = 0, head_stride = 0;

  explicit Pages(const at::Tensor& pages)
      : tensor(pages.size(3) <= 1 || pages.stride(3) == 1 ? pages : pages.contiguous()),
        data(tensor.const_data_ptr<float>()),
        page_size(tensor.size(1)),
        page_stride(tensor.stride(0)),
        row_stride(tensor.stride(1)),
        head_stride(tensor.stride(2)) {}
  const float* at(int64_t page, int64_t place, int64_t head) const {
    return data + page * page_stride + place * row_stride + head * head_stride;
  }
};

// Rows [R, H, D], as pages of one row each.
inline Pages rows_of(const at::Tensor& rows) { return Pages(rows.unsqueeze(1)); }

// The queries of one user, and where the rows that they may see are: cached rows, then new rows.
struct User {
  int64_t first_query, num_queries;  // tokens
  int64_t first_page, num_cached, first_new, num_new;
  int64_t first_key;  // in all users' rows
  int64_t num_keys() const { return num_cached + num_new; }
  int64_t num_blocks() const { return (num_keys() + kBlock - 1) / kBlock; }
};

// Keys and values of all users' rows.
struct History {
  Pages cached_keys, cached_values, new_keys, new_values;
  const int64_t* page_ids;

  // Where a row of a user is: whether it is cached, its page, and its slot in the page.
  std::tuple<bool, int64_t, int64_t> find(const User& user, int64_t row) const {
    if (row >= user.num_cached) return {false, user.first_new + row - user.num_cached, 0};
    const int64_t page_size = cached_keys.page_size;
    return {true, page_ids[user.first_page + row / page_size], row % page_size};
  }
  // Fills pointers to one head's keys and values of a range of rows.
  void find_rows(const User& user, int64_t first, int64_t count, int64_t head, const float** keys,
                 const float** values) const {
    for (int64_t row = first, end = first + count; row < end;) {
      const auto [is_cached, page, place] = find(user, row);
      const Pages &of_keys = is_cached ? cached_keys : new_keys,
                  &of_values = is_cached ? cached_values : new_values;
      const int64_t key_step = is_cached ? of_keys.row_stride : of_keys.page_stride;
      const int64_t value_step = is_cached ? of_values.row_stride : of_values.page_stride;
      const int64_t end_of_run =
          is_cached ? std::min({row + of_keys.page_size - place, user.num_cached, end}) : end;
      const float *key = of_keys.at(page, place, head), *value = of_values.at(page, place, head);
      for (; row < end_of_run; ++row, key += key_step, value += value_step)
        *keys++ = key, *values++ = value;
    }
  }
};

// Which of its user's rows a query sees. A candidate sees the oldest `visible` rows; the query of a
// history row sees that row and the earlier ones. Of these, only the newest `window` are seen. The
// last `num_globals` rows see all rows.
struct Sight {
  const int64_t* visible = nullptr;  // [C], or null for queries of history rows
  int64_t num_tokens = 1, window = 0, num_globals = 0;

  std::tuple<int64_t, int64_t> seen(const User& user, int64_t query) const {
    int64_t end;
    if (visible != nullptr) {
      end = visible[(user.first_query + query) / num_tokens];
    } else if (user.num_queries - query <= num_globals) {
      return {0, user.num_keys()};
    } else {
      end = user.num_keys() - user.num_queries + query + 1;
    }
    return {window > 0 ? std::max<int64_t>(0, end - window) : 0, end};
  }
};

// Biases added to a candidate's scores: by the time since a row, and by the row's position from the
// newest row that the candidate sees.
struct Bias {
  const int64_t *row_times = nullptr, *candidate_times = nullptr;
  const float *time_table = nullptr, *place_table = nullptr;  // [buckets, H]
  int64_t num_times = 0, num_places = 0, num_heads = 1;

  bool is_none() const { return num_times == 0; }
  // 0 below one, then one bucket per doubling; the last is open-ended.
  static int64_t bucket(int64_t amount, int64_t num_buckets) {
    if (amount < 1) return 0;
    return std::min<int64_t>(64 - __builtin_clzll(amount), num_buckets - 1);
  }
};

// The input of a call, read by all its tasks.
struct Problem {
  Sizes sizes;
  Pages queries, own_keys, own_values;  // tokens; queries of history rows have no own tokens
  bool has_own;
  History history;
  Sight sight;
  Bias bias;
  std::vector<User> users;
  std::vector<at::Tensor> kept;  // owns what the pointers above point into

  // Whether two queries of a user have the same time and see the same number of rows.
  bool is_same_moment(const User& user, int64_t query, int64_t other) const {
    if (bias.is_none()) return true;
    const int64_t one = (user.first_query + query) / sight.num_tokens;
    const int64_t two = (user.first_query + other) / sight.num_tokens;
    return bias.candidate_times[one] == bias.candidate_times[two] &&
           sight.visible[one] == sight.visible[two];
  }
  int64_t num_queries() const {
    return users.empty() ? 0 : users.back().first_query + users.back().num_queries;
  }
  int64_t num_keys() const {
    return users.empty() ? 0 : users.back().first_key + users.back().num_keys();
  }
};

// The queries of one task: one head of a range of one user's queries.
struct Span {
  const User& user;
  int64_t head, first, end;
};

// The range of rows that the queries of a tile or a task see.
struct Range {
  int64_t first, end;          // seen by at least one query
  int64_t all_first, all_end;  // seen by every query
  bool is_one_moment = true;   // whether all queries have the same biases

  Range(const Problem& problem, const User& user, int64_t first_query, int64_t end_query)
      : first(INT64_MAX), end(0), all_first(0), all_end(INT64_MAX) {
    for (int64_t query = first_query; query < end_query; ++query) {
      const auto [from, to] = problem.sight.seen(user, query);
      if (to > from) first = std::min(first, from);
      end = std::max(end, to);
      all_first = std::max(all_first, from);
      all_end = std::min(all_end, to);
      is_one_moment &= problem.is_same_moment(user, first_query, query);
    }
    first = std::min(first, end);
  }
};

// The scaled biases of one block's rows for queries of equal time and visibility.
struct BlockBias {
  const Problem& problem;
  const Span& span;
  float factor;
  std::vector<float> times, places;  // the head's column of the tables, scaled
  int64_t block = -1, time = 0, visible = 0;
  float values[kBlock] = {};

  BlockBias(const Problem& problem, const Span& span, float factor)
      : problem(problem), span(span), factor(factor) {
    const Bias& bias = problem.bias;
    times.resize(bias.num_times);
    for (int64_t bucket = 0; bucket < bias.num_times; ++bucket)
      times[bucket] = factor * bias.time_table[bucket * bias.num_heads + span.head];
    places.resize(bias.num_places);
    for (int64_t bucket = 0; bucket < bias.num_places; ++bucket)
      places[bucket] = factor * bias.place_table[bucket * bias.num_heads + span.head];
  }

  // Returns the biases [kBlock] of a query; they hold until the next call.
  const float* of(int64_t query, int64_t of_block) {
    if (problem.bias.is_none()) return kNoBias;
    const int64_t candidate = (span.user.first_query + query) / problem.sight.num_tokens;
    const int64_t its_time = problem.bias.candidate_times[candidate];
    const int64_t its_visible = problem.sight.visible[candidate];
    if (of_block != block || its_time != time || its_visible != visible) {
      block = of_block, time = its_time, visible = its_visible;
      compute();
    }
    return values;
  }

  void compute() {
    const int64_t first = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, span.user.num_keys() - first);
    const int64_t* row_times = problem.bias.row_times + span.user.first_key + first;
    for (int64_t key = 0; key < count; ++key) {
      const auto [of_time, of_place] = buckets(row_times[key], first + key);
      values[key] = of_time < 0 ? 0.0f : times[of_time];
      if (of_place >= 0) values[key] += places[of_place];
    }
  }

  // Time and position bucket of one row for the current time and visibility; -1 for no bias.
  std::tuple<int64_t, int64_t> buckets(int64_t row_time, int64_t row) const {
    const Bias& bias = problem.bias;
    // Unsigned: times far apart wrap round, which is undefined for signed integers.
    const auto elapsed = static_cast<int64_t>(static_cast<uint64_t>(time) - row_time);
    return {row_time == kNoTime ? -1 : Bias::bucket(elapsed, bias.num_times),
            bias.num_places == 0 ? -1 : Bias::bucket(visible - row, bias.num_places)};
  }
};

// The rows of a block of K/V that one head reads.
struct BlockRows {
  const float *keys[kBlock], *values[kBlock];
  int64_t count = 0, dim;
  std::vector<float> copies;  // for many queries, and if D does not fill the last vector

  BlockRows(const Sizes& sizes, int64_t num_queries)
      : dim(sizes.dim),
        copies(num_queries > kPair || sizes.dim < sizes.padded_dim
                   ? 2 * kBlock * sizes.padded_dim : 0, 0.0f) {}

  void find(const Problem& problem, const Span& span, int64_t block) {
    const int64_t first = block * kBlock, padded_dim = problem.sizes.padded_dim;
    count = std::min<int64_t>(kBlock, span.user.num_keys() - first);
    is_checked = false;
    problem.history.find_rows(span.user, first, count, span.head, keys, values);
    if (copies.empty()) return;
    float* to = copies.data();
    for (const float** rows : {keys, values})
      for (int64_t row = 0; row < count; ++row, to += padded_dim)
        rows[row] = std::copy_n(rows[row], dim, to) - dim;
  }

  bool has_finite_values() {
    if (is_checked) return is_finite;
    Vec total{};
    for (int64_t row = 0; row < count; ++row)
      for (int64_t d = 0; d < dim; d += kLanes) total += load(values[row] + d) * 0.0f;
    is_checked = true;
    return is_finite = sum_of(total) == 0.0f;
  }

 private:
  bool is_checked = false, is_finite = false;
};

// Queries of a task that are computed together, as lanes.
struct Tile {
  int64_t first_query, num_queries;
  Range seen;

  Tile(const Problem& problem, const User& user, int64_t first, int64_t end)
      : first_query(first), num_queries(end - first), seen(problem, user, first, end) {}
  // The rows of a block that some query sees; the first is rounded down to a multiple of kGroup.
  std::tuple<int64_t, int64_t> part_of(int64_t block) const {
    return {std::max<int64_t>(0, seen.first - block * kBlock) / kGroup * kGroup,
            std::min<int64_t>(kBlock, seen.end - block * kBlock)};
  }
  bool sees_all(int64_t first_key, int64_t end_key) const {
    return seen.all_first <= first_key && seen.all_end >= end_key;
  }
};

// Divides a range of queries into tiles, of kPair queries but for the last.
std::vector<Tile> tiles_of(const Problem& problem, const Span& span) {
  std::vector<Tile> tiles;
  for (int64_t first = span.first; first < span.end; first += kPair)
    tiles.emplace_back(problem, span.user, first, std::min(first + kPair, span.end));
  return tiles;
}

// The scores [kBlock, lanes] of rows [first, end) of a block; the rows up to a multiple of kGroup are
// written too. `queries` is [D, lanes]; `bias` may be null.
template <int vecs>
void score(const Span& span, const Tile& tile, int64_t block, int64_t first, int64_t end,
           const float* const* keys, int64_t dim, const float* queries, BlockBias* bias,
           float* scores) {
  constexpr int width = vecs * kLanes, rows = vecs == 2 ? kTile : kGroup;
  const bool is_one_moment = bias == nullptr || tile.seen.is_one_moment;
  const float* biases = bias == nullptr ? kNoBias : bias->of(tile.first_query, block);
  for (int lane = 0; lane < width && !is_one_moment; ++lane) {
    const int64_t query = tile.first_query + std::min<int64_t>(lane, tile.num_queries - 1);
    const float* of_query = bias->of(query, block);
    for (int64_t key = first; key < end; ++key) scores[key * width + lane] = of_query[key];
  }
  for (int64_t key = first; key < end; key += rows) {
    const float* of_rows[rows];
    for (int row = 0; row < rows; ++row) of_rows[row] = keys[std::min(key + row, end - 1)];
    float* to = scores + key * width;
    const auto left = [&](int row, int64_t step) { return of_rows[row][step]; };
    const auto right = [=](int64_t step) { return queries + step * width; };
    if (is_one_moment)
      multiply<rows, vecs>(
          dim, [&](int row, int) { return all(biases[key + row]); }, left, right, to, width);
    else
      multiply<rows, vecs>(
          dim, [&](int row, int vec) { return load(to + row * width + vec * kLanes); }, left, right,
          to, width);
  }
}

// Overwrites the scores of rows [first, end) of a block where a query does not see the row.
template <int vecs>
void hide_unseen(const Problem& problem, const Span& span, const Tile& tile, int64_t block,
                 int64_t first, int64_t end, float hidden, float* scores) {
  IntVec from[vecs] = {}, to[vecs] = {};
  for (int lane = 0; lane < tile.num_queries; ++lane) {
    const auto [first_seen, end_seen] = problem.sight.seen(span.user, tile.first_query + lane);
    from[lane / kLanes][lane % kLanes] =
        std::clamp<int64_t>(first_seen - block * kBlock, 0, kBlock);
    to[lane / kLanes][lane % kLanes] = std::clamp<int64_t>(end_seen - block * kBlock, 0, kBlock);
  }
  for (int64_t key = first; key < end; ++key)
    for (int vec = 0; vec < vecs; ++vec) {
      const IntVec keys = static_cast<int32_t>(key) - IntVec{};
      float* place = scores + (key * vecs + vec) * kLanes;
      store(place, (keys >= from[vec]) & (keys < to[vec]) ? load(place) : all(hidden));
    }
}

// State of a running softmax, or SiLU sum, of some queries.
struct Running {
  float* queries;     // [D, lanes], scaled
  float* sums;        // [rows, padded D]
  float* totals;      // [rows], sums of the weights
  float* references;  // [rows], subtracted from scores before the exponential
};

struct Softmax {
  static constexpr float kScale = kLog2E;  // scores are exponents of 2
  // Less than the reference of a row that has seen no key yet.
  static constexpr float kHidden = -INFINITY;

  // The running softmax starts with the own tokens, so that nothing has to be merged afterwards.
  static void open(std::vector<float>& weights, float* total, float* reference) {
    *reference = *std::max_element(weights.begin(), weights.end());
    for (float& weight : weights) *total += weight = std::exp2(weight - *reference);
  }
  // Turns scores [count, lanes] into weights.
  template <int vecs>
  static void weigh(float* scores, int64_t count, int64_t padded_dim, const Running& tile) {
    for (int vec = 0; vec < vecs; ++vec, scores += kLanes) {
      Vec highest = load(scores);
      for (int64_t key = 1; key < count; ++key)
        highest = larger(highest, load(scores + key * vecs * kLanes));
      float* references = tile.references + vec * kLanes;
      Vec reference = load(references), total{};
      const auto is_raised = !(highest <= reference + kSlack);
      if (highest_of(is_raised ? all(1.0f) : Vec{}) > 0.0f) {
        const Vec factor = is_raised ? exp2(reference - highest) : all(1.0f);
        reference = is_raised ? highest : reference;
        store(references, reference);
        float* totals = tile.totals + vec * kLanes;
        store(totals, load(totals) * factor);
        for (int lane = 0; lane < kLanes; ++lane) {
          float* sums = tile.sums + (vec * kLanes + lane) * padded_dim;
          for (int64_t d = 0; d < padded_dim && factor[lane] != 1.0f; ++d) sums[d] *= factor[lane];
        }
      }
      for (int64_t key = 0; key < count; ++key) {
        float* place = scores + key * vecs * kLanes;
        const Vec weight = exp2(load(place) - reference);
        store(place, weight);
        total += weight;
      }
      float* totals = tile.totals + vec * kLanes;
      store(totals, load(totals) + total);
    }
  }
  static float share(float total) { return 1.0f / total; }
  // In base 2, as the scores are in the backward pass.
  static float log_sum(float total, float reference) { return reference + std::log2(total); }
  // Computes weights from scores, and gradients of scores from gradients of weights.
  static void backward(Vec score, Vec weight_gradient, Vec log_sum, Vec delta, Vec* weight,
                       Vec* gradient) {
    *weight = exp2(score - log_sum);
    *gradient = *weight * (weight_gradient - delta);
  }
};

struct Silu {
  static constexpr float kScale = 1.0f;
  static constexpr float kHidden = 0.0f;

  static void open(std::vector<float>& weights, float*, float*) {
    for (float& weight : weights) weight /= 1.0f + std::exp(-weight);
  }
  template <int vecs>
  static void weigh(float* scores, int64_t count, int64_t, const Running&) {
    for (float* place = scores; place < scores + count * vecs * kLanes; place += kLanes) {
      const Vec value = load(place);
      store(place, value * sigmoid(value));
    }
  }
  static float share(float) { return 1.0f; }
  static float log_sum(float, float) { return 0.0f; }
  static void backward(Vec score, Vec weight_gradient, Vec, Vec, Vec* weight, Vec* gradient) {
    const Vec share = sigmoid(score);
    *weight = score * share;
    *gradient = weight_gradient * (share + *weight * (1.0f - share));
  }
};

// Calls work(item, worker) for every item; a free worker takes the next item.
template <typename Work>
void share_out(int64_t num_items, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t first, int64_t end) {
    for (int64_t worker = first; worker < end; ++worker)
      for (int64_t item = next++; item < num_items; item = next++) work(item, worker);
  });
}

template <typename Scoring>
struct Forward {
  const Problem& problem;
  float *out, *log_sums;  // [tokens, H, D], [tokens, H]
  int64_t task_rows;      // maximum rows of a task, a multiple of kPair

  int64_t scratch_size() const {
    const Sizes& sizes = problem.sizes;
    return kBlock * kPair + task_rows * (sizes.dim + sizes.padded_dim + 2);
  }

  void run(const Span& span, float* scratch) const {
    const Sizes& sizes = problem.sizes;
    float* scores = scratch;
    float* free = scratch + kBlock * kPair;
    const Running running{free, free + task_rows * sizes.dim,
                          free + task_rows * (sizes.dim + sizes.padded_dim),
                          free + task_rows * (sizes.dim + sizes.padded_dim + 1)};
    open(span, running);
    BlockBias bias(problem, span, Scoring::kScale);
    BlockRows rows(sizes, span.end - span.first);
    const std::vector<Tile> tiles = tiles_of(problem, span);
    int64_t first = INT64_MAX, end = 0;
    for (const Tile& tile : tiles) {
      first = std::min(first, tile.seen.first);
      end = std::max(end, tile.seen.end);
    }
    for (int64_t block = first / kBlock; block * kBlock < end; ++block) {
      rows.find(problem, span, block);
      for (const Tile& tile : tiles) {
        const int64_t place = tile.first_query - span.first;
        const Running own{running.queries + place * sizes.dim,
                          running.sums + place * sizes.padded_dim, running.totals + place,
                          running.references + place};
        if (tile.num_queries > kLanes)
          add_block<2>(span, tile, block, rows, bias, own, scores);
        else
          add_block<1>(span, tile, block, rows, bias, own, scores);
      }
    }
    close(span, running);
  }

  template <int vecs>
  void add_block(const Span& span, const Tile& tile, int64_t block, BlockRows& rows,
                 BlockBias& bias, const Running& running, float* scores) const {
    const Sizes& sizes = problem.sizes;
    const auto [first, end] = tile.part_of(block);
    if (first >= end) return;
    score<vecs>(span, tile, block, first, end, rows.keys, sizes.dim, running.queries, &bias, scores);
    const bool hides = !tile.sees_all(block * kBlock + first, block * kBlock + end);
    if (hides)
      hide_unseen<vecs>(problem, span, tile, block, first, end, Scoring::kHidden, scores);
    const int64_t num_keys = end - first;
    const float* const* values = rows.values + first;
    scores += first * vecs * kLanes;
    Scoring::template weigh<vecs>(scores, num_keys, sizes.padded_dim, running);
    if (hides && !rows.has_finite_values())
      add_seen(span, tile, block * kBlock + first, num_keys, scores, vecs * kLanes, values,
               running.sums);
    else
      multiply_add(
          tile.num_queries, num_keys, sizes.padded_dim,
          [=](int64_t row, int64_t step) { return scores[step * vecs * kLanes + row]; },
          [=](int64_t step) { return values[step]; }, running.sums);
  }

  // The product with the visible rows only: a hidden row weighs zero, and zero times NaN is NaN.
  void add_seen(const Span& span, const Tile& tile, int64_t first_key, int64_t num_keys,
                const float* weights, int64_t width, const float* const* values,
                float* sums) const {
    for (int64_t place = 0; place < tile.num_queries; ++place) {
      const auto [first, end] = problem.sight.seen(span.user, tile.first_query + place);
      for (int64_t key = 0; key < num_keys; ++key)
        if (first <= first_key + key && first_key + key < end)
          add_scaled(values[key], weights[key * width + place], problem.sizes.dim,
                     sums + place * problem.sizes.padded_dim);
    }
  }

  void open(const Span& span, const Running& running) const {
    const Sizes& sizes = problem.sizes;
    std::fill_n(running.queries, task_rows * sizes.dim, 0.0f);
    std::fill_n(running.sums, task_rows * sizes.padded_dim, 0.0f);
    std::fill_n(running.totals, task_rows, 0.0f);
    std::fill_n(running.references, task_rows, kUnseen);
    const float scale = Scoring::kScale * sizes.scale();
    const int64_t num_queries = span.end - span.first, num_tokens = problem.sight.num_tokens;
    std::vector<float> weights(num_tokens), query(sizes.dim);
    for (int64_t place = 0; place < num_queries; ++place) {
      const int64_t token = span.user.first_query + span.first + place;
      const float* from = problem.queries.at(token, 0, span.head);
      const int64_t lane = place % kPair, first = place - lane;
      const int64_t width = num_queries - first > kLanes ? kPair : kLanes;
      float* to = running.queries + first * sizes.dim + lane;
      for (int64_t d = 0; d < sizes.dim; ++d) to[d * width] = query[d] = from[d] * scale;
      if (!problem.has_own) continue;
      const int64_t first_own = token / num_tokens * num_tokens;
      for (int64_t own = 0; own < num_tokens; ++own)
        weights[own] =
            dot(query.data(), problem.own_keys.at(first_own + own, 0, span.head), sizes.dim);
      Scoring::open(weights, running.totals + place, running.references + place);
      for (int64_t own = 0; own < num_tokens; ++own)
        add_scaled(problem.own_values.at(first_own + own, 0, span.head), weights[own], sizes.dim,
                   running.sums + place * sizes.padded_dim);
    }
  }

  void close(const Span& span, const Running& running) const {
    const Sizes& sizes = problem.sizes;
    for (int64_t place = 0; place < span.end - span.first; ++place) {
      const int64_t token = span.user.first_query + span.first + place;
      const float total = running.totals[place], share = Scoring::share(total);
      const float* sums = running.sums + place * sizes.padded_dim;
      float* to = out + (token * sizes.num_heads + span.head) * sizes.dim;
      for (int64_t d = 0; d < sizes.dim; ++d) to[d] = sums[d] * share;
      log_sums[token * sizes.num_heads + span.head] =
          Scoring::log_sum(total, running.references[place]);
    }
  }
};

template <typename Scoring>
std::tuple<at::Tensor, at::Tensor> forward(const Problem& problem) {
  const Sizes& sizes = problem.sizes;
  const auto options = problem.queries.tensor.options();
  const int64_t num_tokens = problem.queries.tensor.size(0);
  at::Tensor out = at::empty({num_tokens, sizes.num_heads, sizes.dim}, options);
  at::Tensor log_sums = at::empty({num_tokens, sizes.num_heads}, options);
  if (out.numel() == 0) return {out, log_sums.zero_()};
  const int64_t num_queries = problem.num_queries();
  out.slice(0, num_queries).zero_();
  log_sums.slice(0, num_queries).zero_();
  int64_t most_queries = 0;
  for (const User& user : problem.users) most_queries = std::max(most_queries, user.num_queries);
  const int64_t task_rows = std::min<int64_t>(kTaskRows, (most_queries + kPair - 1) / kPair * kPair);
  std::vector<Span> tasks;
  for (const User& user : problem.users)
    // The last rows of a history see most rows, so they are the longest tasks: they go first.
    for (int64_t end = user.num_queries; end > 0; end -= task_rows)
      for (int64_t head = 0; head < sizes.num_heads; ++head)
        tasks.push_back({user, head, std::max<int64_t>(0, end - task_rows), end});
  const Forward<Scoring> attention{problem, out.data_ptr<float>(), log_sums.data_ptr<float>(),
                                   task_rows};
  // Rounded up so that each worker's scratch starts on a cache line.
  const int64_t scratch_size = (attention.scratch_size() + 15) / 16 * 16;
  at::Tensor scratch = at::empty({at::get_num_threads(), scratch_size}, options);
  float* scratch_data = scratch.data_ptr<float>();
  share_out(static_cast<int64_t>(tasks.size()), [&](int64_t task, int64_t worker) {
    attention.run(tasks[task], scratch_data + worker * scratch_size);
  });
  return {out, log_sums};
}

// Gradients of everything that a call reads; rows of K/V are in the order of the users.
struct Gradients {
  at::Tensor queries, own_keys, own_values;  // [tokens, H, D]
  at::Tensor keys, values;                   // [all users' rows, H, D]
  at::Tensor tables;                         // [users, H, time and place buckets]

  explicit Gradients(const Problem& problem) {
    const Sizes& sizes = problem.sizes;
    const auto options = problem.queries.tensor.options();
    const int64_t num_tokens = problem.queries.tensor.size(0);
    queries = at::zeros({num_tokens, sizes.num_heads, sizes.dim}, options);
    own_keys = at::zeros({problem.has_own ? num_tokens : 0, sizes.num_heads, sizes.dim}, options);
    own_values = at::zeros_like(own_keys);
    keys = at::zeros({problem.num_keys(), sizes.num_heads, sizes.dim}, options);
    values = at::zeros_like(keys);
    const int64_t num_buckets = problem.bias.num_times + problem.bias.num_places;
    const int64_t num_users = static_cast<int64_t>(problem.users.size());
    tables = at::zeros({num_users, sizes.num_heads, num_buckets}, options);
  }
  static float* at(const at::Tensor& rows, int64_t row, int64_t head) {
    return rows.data_ptr<float>() + (row * rows.size(1) + head) * rows.size(2);
  }
};

// One head of one user: for each block of its rows, all tiles of its queries.
template <typename Scoring>
struct Backward {
  const Problem& problem;
  Pages out_gradient;  // [tokens, 1, H, D]
  Pages out;
  const float* log_sums;  // [tokens, H]
  Gradients& gradients;

  // Copies of a user's queries and gradients, for tiles of kPair; padded with zeros.
  struct Queries {
    std::vector<float> rows, out_rows;        // [queries, padded D]; the queries are scaled
    std::vector<float> columns, out_columns;  // [tiles, D, kPair]
    std::vector<float> sums;                  // [queries, padded D], gradients of `rows`
    std::vector<float> deltas, logs;          // [queries]
  };

  // A block of rows: its gradients, and the weights of a tile of queries on these rows.
  struct Scratch {
    BlockRows rows;
    std::vector<float> key_sums, value_sums;  // [kBlock, padded D]
    std::vector<float> weights, gradients;    // [kBlock, kPair]

    Scratch(const Sizes& sizes, int64_t num_queries)
        : rows(sizes, num_queries),
          key_sums(kBlock * sizes.padded_dim),
          value_sums(kBlock * sizes.padded_dim),
          weights(kBlock * kPair),
          gradients(kBlock * kPair) {}
  };

  void run(int64_t place, int64_t head) const {
    const User& user = problem.users[place];
    const Sizes& sizes = problem.sizes;
    const Span span{user, head, 0, user.num_queries};
    Queries queries = copies_of(span);
    if (problem.has_own) own_tokens(span, queries);
    const std::vector<Tile> tiles = tiles_of(problem, span);
    BlockBias bias(problem, span, 1.0f);  // kScale is applied after the product.
    float* tables = Gradients::at(gradients.tables, place, head);
    Scratch scratch(sizes, user.num_queries);
    for (int64_t block = 0; block * kBlock < user.num_keys(); ++block) {
      scratch.rows.find(problem, span, block);
      std::fill(scratch.key_sums.begin(), scratch.key_sums.end(), 0.0f);
      std::fill(scratch.value_sums.begin(), scratch.value_sums.end(), 0.0f);
      for (const Tile& tile : tiles) add_block(span, tile, block, bias, queries, scratch, tables);
      for (int64_t row = 0; row < scratch.rows.count; ++row) {
        const int64_t key = user.first_key + block * kBlock + row, from = row * sizes.padded_dim;
        std::copy_n(scratch.key_sums.data() + from, sizes.dim,
                    Gradients::at(gradients.keys, key, head));
        std::copy_n(scratch.value_sums.data() + from, sizes.dim,
                    Gradients::at(gradients.values, key, head));
      }
    }
    for (int64_t query = 0; query < user.num_queries; ++query)
      add_scaled(queries.sums.data() + query * sizes.padded_dim, sizes.scale(), sizes.dim,
                 Gradients::at(gradients.queries, user.first_query + query, head));
  }

  Queries copies_of(const Span& span) const {
    const Sizes& sizes = problem.sizes;
    const int64_t padded = (span.end + kPair - 1) / kPair * kPair;
    const std::vector<float> of_rows(padded * sizes.padded_dim), of_columns(padded * sizes.dim);
    const std::vector<float> of_queries(padded);
    Queries queries{of_rows, of_rows, of_columns, of_columns, of_rows, of_queries, of_queries};
    for (int64_t query = 0; query < span.end; ++query) {
      const int64_t token = span.user.first_query + query, lane = query % kPair;
      const float* from = problem.queries.at(token, 0, span.head);
      const float* gradient = out_gradient.at(token, 0, span.head);
      for (int64_t d = 0; d < sizes.dim; ++d) {
        const int64_t row = query * sizes.padded_dim + d;
        const int64_t column = (query - lane) * sizes.dim + d * kPair + lane;
        queries.rows[row] = queries.columns[column] = from[d] * sizes.scale();
        queries.out_rows[row] = queries.out_columns[column] = gradient[d];
      }
      queries.deltas[query] = dot(gradient, out.at(token, 0, span.head), sizes.dim);
      queries.logs[query] = log_sums[token * sizes.num_heads + span.head];
    }
    return queries;
  }

  // Computes the weights of a tile on a block of rows and the scores' gradients, and adds both to
  // the gradients of queries, keys and values.
  void add_block(const Span& span, const Tile& tile, int64_t block, BlockBias& bias,
                 Queries& queries, Scratch& scratch, float* tables) const {
    const Sizes& sizes = problem.sizes;
    const auto [first, end] = tile.part_of(block);
    if (first >= end) return;
    const int64_t columns = tile.first_query * sizes.dim, rows = tile.first_query * sizes.padded_dim;
    float *weights = scratch.weights.data(), *gradients = scratch.gradients.data();
    const BlockRows& of_block = scratch.rows;
    score<2>(span, tile, block, first, end, of_block.keys, sizes.dim,
             queries.columns.data() + columns, &bias, weights);
    score<2>(span, tile, block, first, end, of_block.values, sizes.dim,
             queries.out_columns.data() + columns, nullptr, gradients);
    const int64_t end_row = (end + kGroup - 1) / kGroup * kGroup;
    for (int64_t key = first; key < end_row; ++key)
      for (int lane = 0; lane < kPair; lane += kLanes) {
        float *to_weight = weights + key * kPair + lane, *to = gradients + key * kPair + lane;
        Vec weight, gradient;
        Scoring::backward(load(to_weight) * Scoring::kScale, load(to),
                          load(queries.logs.data() + tile.first_query + lane),
                          load(queries.deltas.data() + tile.first_query + lane), &weight,
                          &gradient);
        store(to_weight, weight);
        store(to, gradient);
      }
    for (float* scores : {weights, gradients})
      hide_unseen<2>(problem, span, tile, block, first, end_row, 0.0f, scores);
    const auto multiply_block = [&](const float* scores, const float* rows, float* sums) {
      multiply_add(
          end - first, kPair, sizes.padded_dim,
          [=](int64_t row, int64_t step) { return scores[(first + row) * kPair + step]; },
          [=](int64_t step) { return rows + step * sizes.padded_dim; },
          sums + first * sizes.padded_dim);
    };
    multiply_block(gradients, queries.rows.data() + rows, scratch.key_sums.data());
    multiply_block(weights, queries.out_rows.data() + rows, scratch.value_sums.data());
    multiply_add(
        kPair, end - first, sizes.padded_dim,
        [=](int64_t row, int64_t step) { return gradients[(first + step) * kPair + row]; },
        [&](int64_t step) { return of_block.keys[first + step]; }, queries.sums.data() + rows);
    add_to_tables(span, tile, block, first, end, bias, gradients, tables);
  }

  void add_to_tables(const Span& span, const Tile& tile, int64_t block, int64_t first, int64_t end,
                     BlockBias& bias, const float* gradients, float* tables) const {
    if (problem.bias.is_none()) return;
    const int64_t first_key = block * kBlock;
    const int64_t* row_times = problem.bias.row_times + span.user.first_key + first_key;
    for (int64_t lane = 0; lane < tile.num_queries; ++lane) {
      const int64_t query = span.user.first_query + tile.first_query + lane;
      const int64_t candidate = query / problem.sight.num_tokens;
      bias.time = problem.bias.candidate_times[candidate];
      bias.visible = problem.sight.visible[candidate];
      for (int64_t key = first; key < end; ++key) {
        const float gradient = gradients[key * kPair + lane];
        if (gradient == 0.0f) continue;
        const auto [of_time, of_place] = bias.buckets(row_times[key], first_key + key);
        if (of_time >= 0) tables[of_time] += gradient;
        if (of_place >= 0) tables[problem.bias.num_times + of_place] += gradient;
      }
    }
    bias.block = -1;  // Its time and visibility have changed.
  }

  void own_tokens(const Span& span, Queries& queries) const {
    const Sizes& sizes = problem.sizes;
    const int64_t num_tokens = problem.sight.num_tokens;
    for (int64_t query = 0; query < span.end; ++query) {
      const int64_t token = span.user.first_query + query;
      const float* scaled = queries.rows.data() + query * sizes.padded_dim;
      const float* gradient = queries.out_rows.data() + query * sizes.padded_dim;
      const int64_t first_own = token / num_tokens * num_tokens;
      for (int64_t own = first_own; own < first_own + num_tokens; ++own) {
        const float* key = problem.own_keys.at(own, 0, span.head);
        const float* value = problem.own_values.at(own, 0, span.head);
        Vec weight, score_gradient;
        Scoring::backward(all(dot(scaled, key, sizes.dim) * Scoring::kScale),
                          all(dot(gradient, value, sizes.dim)), all(queries.logs[query]),
                          all(queries.deltas[query]), &weight, &score_gradient);
        add_scaled(gradient, weight[0], sizes.dim,
                   Gradients::at(gradients.own_values, own, span.head));
        add_scaled(scaled, score_gradient[0], sizes.dim,
                   Gradients::at(gradients.own_keys, own, span.head));
        add_scaled(key, score_gradient[0], sizes.dim,
                   queries.sums.data() + query * sizes.padded_dim);
      }
    }
  }
};

template <typename Scoring>
Gradients backward(const Problem& problem, const at::Tensor& out_gradient, const at::Tensor& out,
                   const at::Tensor& log_sums) {
  Gradients gradients(problem);
  const at::Tensor dense_log_sums = log_sums.contiguous();
  const Backward<Scoring> attention{problem, rows_of(out_gradient), rows_of(out),
                                    dense_log_sums.const_data_ptr<float>(), gradients};
  const int64_t num_heads = problem.sizes.num_heads;
  share_out(static_cast<int64_t>(problem.users.size()) * num_heads, [&](int64_t task, int64_t) {
    attention.run(task / num_heads, task % num_heads);
  });
  return gradients;
}

std::string_view name_of(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

// These checks make sure that everything that is read lies within its tensor; nothing checks again
// after them.
void check_tensor(const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                  int64_t num_dimensions) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " is ", name_of(tensor.scalar_type()),
                    "; it takes ", name_of(dtype));
  TORCH_CHECK_VALUE(tensor.dim() == num_dimensions, name, " is ", tensor.sizes(), "; it takes ",
                    num_dimensions, " dimensions");
  // Sizes of 0 are skipped: they would hide how large the others are.
  int64_t num_numbers = 1;
  for (const int64_t size : tensor.sizes()) {
    TORCH_CHECK_VALUE(size <= kMostNumbers / num_numbers, name, " is ", tensor.sizes(),
                      "; it takes at most ", kMostNumbers, " numbers");
    num_numbers *= std::max<int64_t>(1, size);
  }
}

void check_alike(const char* name, const at::Tensor& tensor, const char* other_name,
                 const at::Tensor& other) {
  check_tensor(name, tensor, at::kFloat, other.dim());
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), name, " is ", tensor.sizes(), "; ", other_name,
                    " is ", other.sizes());
}

void check_heads(const char* name, const at::Tensor& tensor, int64_t num_dimensions,
                 const at::Tensor& queries) {
  check_tensor(name, tensor, at::kFloat, num_dimensions);
  TORCH_CHECK_VALUE(tensor.sizes().slice(num_dimensions - 2) == queries.sizes().slice(queries.dim() - 2),
                    name, " is ", tensor.sizes(), "; queries is ", queries.sizes());
}

// Checks offsets [B + 1]: from 0, never falling, to at most num_rows; -1 for no limit. Rows after
// the last offset are padding.
const int64_t* check_offsets(const char* name, const at::Tensor& offsets, int64_t num_users,
                             int64_t num_rows, std::vector<at::Tensor>& kept) {
  check_tensor(name, offsets, at::kLong, 1);
  TORCH_CHECK_VALUE(offsets.size(0) > 0, name, " has 0 offsets; no users have 1");
  TORCH_CHECK_VALUE(offsets.size(0) == num_users + 1, name, " has ", offsets.size(0),
                    " offsets; ", num_users, " users have ", num_users + 1);
  kept.push_back(offsets.contiguous());
  const int64_t* data = kept.back().const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(data[0] == 0, name, " starts at ", data[0], "; it starts at 0");
  for (int64_t user = 0; user < num_users; ++user)
    TORCH_CHECK_VALUE(data[user] <= data[user + 1], name, " goes from ", data[user], " to ",
                      data[user + 1], "; it never falls");
  TORCH_CHECK_VALUE(num_rows < 0 || data[num_users] <= num_rows, name, " ends at ",
                    data[num_users], "; there are ", num_rows, " rows");
  TORCH_CHECK_VALUE(data[num_users] <= kMostNumbers, name, " ends at ", data[num_users]);
  return data;
}

const int64_t* check_numbers(const char* name, const at::Tensor& numbers, int64_t count,
                             std::vector<at::Tensor>& kept) {
  check_tensor(name, numbers, at::kLong, 1);
  TORCH_CHECK_VALUE(numbers.size(0) >= count, name, " has ", numbers.size(0), " numbers; ", count,
                    " are needed");
  kept.push_back(numbers.contiguous());
  return kept.back().const_data_ptr<int64_t>();
}

// Checks that each user has enough pages for its rows and that each page is in the table.
const int64_t* check_pages(const at::Tensor& pages, const at::Tensor& page_ids,
                           const int64_t* page_offsets, const int64_t* row_offsets,
                           int64_t num_users, std::vector<at::Tensor>& kept) {
  const int64_t* ids = check_numbers("page_ids", page_ids, page_offsets[num_users], kept);
  for (int64_t place = 0; place < page_offsets[num_users]; ++place)
    TORCH_CHECK_VALUE(0 <= ids[place] && ids[place] < pages.size(0), "page_ids has ", ids[place],
                      "; there are ", pages.size(0), " pages");
  const int64_t page_size = pages.size(1);
  for (int64_t user = 0; user < num_users; ++user) {
    const int64_t num_rows = row_offsets[user + 1] - row_offsets[user];
    const int64_t num_pages = page_offsets[user + 1] - page_offsets[user];
    // Written so that it does not overflow and does not divide by a page size of 0.
    TORCH_CHECK_VALUE(num_rows == 0 || (page_size > 0 && num_pages > (num_rows - 1) / page_size),
                      "page_offsets gives user ", user, " ", num_pages, " pages of ", page_size,
                      " rows; its rows are ", num_rows);
  }
  return ids;
}

#define SAVED_ARGUMENTS \
  const at::Tensor &out_gradient, const at::Tensor &out, const at::Tensor &log_sums
#define HISTORY_ARGUMENTS                                                                        \
  const at::Tensor &queries, const at::Tensor &query_offsets, const at::Tensor &keys,            \
      const at::Tensor &values, const at::Tensor &key_offsets, const at::Tensor &cached_keys,    \
      const at::Tensor &cached_values, const at::Tensor &page_ids,                               \
      const at::Tensor &page_offsets, const at::Tensor &cached_offsets, int64_t window,          \
      int64_t num_globals, c10::string_view scoring
#define HISTORY_VALUES                                                                          \
  queries, query_offsets, keys, values, key_offsets, cached_keys, cached_values, page_ids,      \
      page_offsets, cached_offsets, window, num_globals, scoring
#define CANDIDATE_ARGUMENTS                                                                      \
  const at::Tensor &queries, const at::Tensor &own_keys, const at::Tensor &own_values,           \
      const at::Tensor &candidate_offsets, const at::Tensor &keys, const at::Tensor &values,     \
      const at::Tensor &page_ids, const at::Tensor &page_offsets, const at::Tensor &row_offsets, \
      const at::Tensor &row_times, const at::Tensor &candidate_times,                            \
      const at::Tensor &visible_rows, const at::Tensor &time_bias, const at::Tensor &place_bias, \
      int64_t window, c10::string_view scoring
#define CANDIDATE_VALUES                                                                       \
  queries, own_keys, own_values, candidate_offsets, keys, values, page_ids, page_offsets,      \
      row_offsets, row_times, candidate_times, visible_rows, time_bias, place_bias, window, scoring

void check_window(int64_t window) {
  TORCH_CHECK_VALUE(window >= 0, "window is ", window, "; it takes a number of rows, or 0 for all");
}

Problem history_problem(HISTORY_ARGUMENTS) {
  check_window(window);
  TORCH_CHECK_VALUE(num_globals >= 0, "num_globals is ", num_globals, "; it takes at least 0");
  check_tensor("queries", queries, at::kFloat, 3);
  check_heads("keys", keys, 3, queries);
  check_alike("values", values, "keys", keys);
  check_heads("cached_keys", cached_keys, 4, queries);
  check_alike("cached_values", cached_values, "cached_keys", cached_keys);
  const int64_t num_users = query_offsets.numel() - 1;
  std::vector<at::Tensor> kept;
  const int64_t* rows = check_offsets("query_offsets", query_offsets, num_users, queries.size(0), kept);
  const int64_t* fresh = check_offsets("key_offsets", key_offsets, num_users, keys.size(0), kept);
  const int64_t* pages = check_offsets("page_offsets", page_offsets, num_users, -1, kept);
  const int64_t* cached = check_offsets("cached_offsets", cached_offsets, num_users, -1, kept);
  const int64_t* ids = check_pages(cached_keys, page_ids, pages, cached, num_users, kept);
  Problem problem{Sizes(queries.size(1), queries.size(2)),
                  rows_of(queries),
                  rows_of(queries),
                  rows_of(queries),
                  false,
                  History{Pages(cached_keys), Pages(cached_values), rows_of(keys), rows_of(values), ids},
                  Sight{nullptr, 1, window, num_globals},
                  Bias{},
                  {},
                  {}};
  for (int64_t user = 0; user < num_users; ++user) {
    const int64_t num_queries = rows[user + 1] - rows[user], num_new = fresh[user + 1] - fresh[user];
    TORCH_CHECK_VALUE(num_queries <= num_new, "key_offsets gives user ", user, " ", num_new,
                      " keys; its queries are ", num_queries, ", those of its last");
    problem.users.push_back({rows[user], num_queries, pages[user], cached[user + 1] - cached[user],
                             fresh[user], num_new, cached[user] + fresh[user]});
  }
  problem.kept = std::move(kept);
  return problem;
}

Problem candidate_problem(CANDIDATE_ARGUMENTS) {
  check_window(window);
  check_tensor("queries", queries, at::kFloat, 4);
  check_alike("own_keys", own_keys, "queries", queries);
  check_alike("own_values", own_values, "queries", queries);
  check_heads("keys", keys, 4, queries);
  check_alike("values", values, "keys", keys);
  const int64_t num_users = candidate_offsets.numel() - 1, num_candidates = queries.size(0);
  const int64_t num_tokens = queries.size(1), num_heads = queries.size(2);
  std::vector<at::Tensor> kept;
  const int64_t* candidates =
      check_offsets("candidate_offsets", candidate_offsets, num_users, num_candidates, kept);
  const int64_t* pages = check_offsets("page_offsets", page_offsets, num_users, -1, kept);
  const int64_t* rows = check_offsets("row_offsets", row_offsets, num_users, -1, kept);
  const int64_t* ids = check_pages(keys, page_ids, pages, rows, num_users, kept);
  const int64_t* visible = check_numbers("visible_rows", visible_rows, num_candidates, kept);
  Bias bias;
  bias.row_times = check_numbers("row_times", row_times, rows[num_users], kept);
  bias.candidate_times = check_numbers("candidate_times", candidate_times, num_candidates, kept);
  for (const auto& [name, table] : {std::tuple{"time_bias", time_bias}, {"place_bias", place_bias}}) {
    check_tensor(name, table, at::kFloat, 2);
    TORCH_CHECK_VALUE(table.size(1) == num_heads, name, " is ", table.sizes(), "; queries is ",
                      queries.sizes());
    kept.push_back(table.contiguous());
  }
  TORCH_CHECK_VALUE(time_bias.size(0) > 0, "time_bias has no buckets");
  bias.time_table = kept[kept.size() - 2].const_data_ptr<float>();
  bias.place_table = kept.back().const_data_ptr<float>();
  bias.num_times = time_bias.size(0), bias.num_places = place_bias.size(0);
  bias.num_heads = num_heads;
  Problem problem{Sizes(num_heads, queries.size(3)),
                  rows_of(queries.flatten(0, 1)),
                  rows_of(own_keys.flatten(0, 1)),
                  rows_of(own_values.flatten(0, 1)),
                  true,
                  History{Pages(keys), Pages(values), rows_of(queries.flatten(0, 1)),
                          rows_of(queries.flatten(0, 1)), ids},
                  Sight{visible, num_tokens, window, 0},
                  bias,
                  {},
                  {}};
  for (int64_t user = 0; user < num_users; ++user) {
    const int64_t first = candidates[user], end = candidates[user + 1];
    const int64_t num_rows = rows[user + 1] - rows[user];
    for (int64_t candidate = first; candidate < end; ++candidate)
      TORCH_CHECK_VALUE(0 <= visible[candidate] && visible[candidate] <= num_rows,
                        "visible_rows has ", visible[candidate], "; its user has ", num_rows,
                        " rows");
    problem.users.push_back({first * num_tokens, (end - first) * num_tokens, pages[user], num_rows,
                             0, 0, rows[user]});
  }
  problem.kept = std::move(kept);
  return problem;
}

bool is_silu(c10::string_view scoring) {
  TORCH_CHECK_VALUE(scoring == "softmax" || scoring == "silu", "scoring is ", scoring,
                    "; softmax and silu exist");
  return scoring == "silu";
}

// Whether this backend computes it: float32 on a CPU. The plain backend, in Python, does the rest.
bool is_ours(const at::Tensor& queries) {
  return queries.scalar_type() == at::kFloat && queries.device().is_cpu();
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Seven = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                         at::Tensor>;

Pair history_attention(HISTORY_ARGUMENTS) {
  if (!is_ours(queries))
    return find<Pair(HISTORY_ARGUMENTS)>("torchrec_kvshare::plain_history_attention")
        .call(HISTORY_VALUES);
  const Problem problem = history_problem(HISTORY_VALUES);
  return is_silu(scoring) ? forward<Silu>(problem) : forward<Softmax>(problem);
}

Pair candidate_attention(CANDIDATE_ARGUMENTS) {
  if (!is_ours(queries))
    return find<Pair(CANDIDATE_ARGUMENTS)>("torchrec_kvshare::plain_candidate_attention")
        .call(CANDIDATE_VALUES);
  const Problem problem = candidate_problem(CANDIDATE_VALUES);
  const auto [out, log_sums] = is_silu(scoring) ? forward<Silu>(problem) : forward<Softmax>(problem);
  return {out.view(queries.sizes()), log_sums.view(queries.sizes().slice(0, 3))};
}

Gradients gradients_of(const Problem& problem, c10::string_view scoring,
                       const at::Tensor& out_gradient, const at::Tensor& out,
                       const at::Tensor& log_sums) {
  const at::IntArrayRef sizes = problem.queries.tensor.sizes();
  const std::vector<int64_t> rows{sizes[0], sizes[2], sizes[3]};
  TORCH_CHECK_VALUE(log_sums.numel() == sizes[0] * sizes[2], "log_sums is ", log_sums.sizes(),
                    "; there are ", sizes[0], " queries of ", sizes[2], " heads");
  return is_silu(scoring)
             ? backward<Silu>(problem, out_gradient.reshape(rows), out.reshape(rows), log_sums)
             : backward<Softmax>(problem, out_gradient.reshape(rows), out.reshape(rows), log_sums);
}

// Adds gradients of rows, in the order of the users, into the tensor that the rows were read from.
at::Tensor scatter(const at::Tensor& gradients, const std::vector<int64_t>& places,
                   at::IntArrayRef sizes) {
  const int64_t num_rows = sizes.size() == 4 ? sizes[0] * sizes[1] : sizes[0];
  const auto index = at::tensor(places, at::kLong);
  return at::zeros({num_rows, gradients.size(1), gradients.size(2)}, gradients.options())
      .index_add_(0, index, gradients)
      .view(sizes);
}

Three history_attention_backward(SAVED_ARGUMENTS, HISTORY_ARGUMENTS) {
  if (!is_ours(queries))
    return find<Three(SAVED_ARGUMENTS, HISTORY_ARGUMENTS)>(
               "torchrec_kvshare::plain_history_attention_backward")
        .call(out_gradient, out, log_sums, HISTORY_VALUES);
  const Problem problem = history_problem(HISTORY_VALUES);
  const Gradients gradients = gradients_of(problem, scoring, out_gradient, out, log_sums);
  std::vector<int64_t> rows;
  for (const User& user : problem.users)
    for (int64_t row = 0; row < user.num_new; ++row)
      rows.push_back(user.first_key + user.num_cached + row);
  const auto index = at::tensor(rows, at::kLong);
  const auto of_new = [&](const at::Tensor& of_all) {
    at::Tensor of_keys = at::zeros(keys.sizes(), of_all.options());
    of_keys.narrow(0, 0, index.size(0)).copy_(of_all.index_select(0, index));
    return of_keys;
  };
  return {gradients.queries, of_new(gradients.keys), of_new(gradients.values)};
}

Seven candidate_attention_backward(SAVED_ARGUMENTS, CANDIDATE_ARGUMENTS) {
  if (!is_ours(queries))
    return find<Seven(SAVED_ARGUMENTS, CANDIDATE_ARGUMENTS)>(
               "torchrec_kvshare::plain_candidate_attention_backward")
        .call(out_gradient, out, log_sums, CANDIDATE_VALUES);
  const Problem problem = candidate_problem(CANDIDATE_VALUES);
  const Gradients gradients = gradients_of(problem, scoring, out_gradient, out, log_sums);
  std::vector<int64_t> places;
  for (const User& user : problem.users)
    for (int64_t row = 0; row < user.num_cached; ++row) {
      const auto [is_cached, page, place] = problem.history.find(user, row);
      places.push_back(page * problem.history.cached_keys.page_size + place);
    }
  const at::Tensor tables = gradients.tables.sum(0).t();  // [buckets, H]
  const int64_t num_times = time_bias.size(0);
  return {gradients.queries.view(queries.sizes()),
          gradients.own_keys.view(queries.sizes()),
          gradients.own_values.view(queries.sizes()),
          scatter(gradients.keys, places, keys.sizes()),
          scatter(gradients.values, places, keys.sizes()),
          tables.slice(0, 0, num_times).contiguous(),
          tables.slice(0, num_times).contiguous()};
}

// Rows [G, R, K] times weights [G, N, K], plus bias [N]. A row's result does not depend on the
// other rows, to the bit: its sums are taken in the same order in any tile, and tiles are padded
// with zeros. With few columns a tile would be mostly padding, so they are dot products.
struct RowsLinear {
  const float *rows, *weight, *bias;
  int64_t num_groups, num_rows, depth, num_columns;
  int64_t num_blocks = (num_columns + kPair - 1) / kPair;
  std::vector<float> packed =
      std::vector<float>(has_few_columns() ? 0 : num_groups * num_blocks * kPair * depth);
  std::vector<float> starts = std::vector<float>(num_blocks * kPair);

  float* packed_block(int64_t group, int64_t block) {
    return packed.data() + (group * num_blocks + block) * kPair * depth;
  }

  void pack(int64_t group, int64_t block) {
    const int64_t first = block * kPair, count = std::min<int64_t>(kPair, num_columns - first);
    for (int64_t column = 0; column < count; ++column) {
      const float* from = weight + (group * num_columns + first + column) * depth;
      float* to = packed_block(group, block) + column;
      for (int64_t d = 0; d < depth; ++d) to[d * kPair] = from[d];
    }
  }

  bool has_few_columns() const { return num_columns <= kFewColumns; }

  void run_few(int64_t group, int64_t first_row, int64_t end_row, float* out) const {
    for (int64_t row = group * num_rows + first_row; row < group * num_rows + end_row; ++row)
      for (int64_t column = 0; column < num_columns; ++column)
        out[row * num_columns + column] =
            bias[column] + dot(rows + row * depth,
                               weight + (group * num_columns + column) * depth, depth);
  }

  void run(int64_t group, int64_t first_row, int64_t end_row, float* out) {
    std::vector<float> last(kTile * depth, 0.0f);
    float tile[kTile * kPair];
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * kPair, columns = std::min<int64_t>(kPair, num_columns - first);
      const float* start = starts.data() + first;
      for (int64_t row = first_row; row < end_row; row += kTile) {
        const int64_t count = std::min<int64_t>(kTile, end_row - row);
        const float* from = rows + (group * num_rows + row) * depth;
        if (count < kTile) {
          std::copy_n(from, count * depth, last.data());
          from = last.data();
        }
        const float* block_weight = packed_block(group, block);
        multiply<kTile, 2>(
            depth, [=](int, int vec) { return load(start + vec * kLanes); },
            [&](int r, int64_t step) { return from[r * depth + step]; },
            [=](int64_t step) { return block_weight + step * kPair; }, tile, kPair);
        for (int64_t place = 0; place < count; ++place)
          std::copy_n(tile + place * kPair, columns,
                      out + (group * num_rows + row + place) * num_columns + first);
      }
    }
  }
};

at::Tensor rows_linear(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& bias) {
  if (!is_ours(rows))
    return find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
               "torchrec_kvshare::plain_rows_linear")
        .call(rows, weight, bias);
  check_tensor("rows", rows, at::kFloat, 3);
  check_tensor("weight", weight, at::kFloat, 3);
  check_tensor("bias", bias, at::kFloat, 1);
  TORCH_CHECK_VALUE(weight.size(0) == rows.size(0) && weight.size(2) == rows.size(2), "weight is ",
                    weight.sizes(), "; rows is ", rows.sizes());
  TORCH_CHECK_VALUE(bias.size(0) == weight.size(1), "bias is ", bias.sizes(), "; weight is ",
                    weight.sizes());
  at::Tensor out = at::empty({rows.size(0), rows.size(1), weight.size(1)}, rows.options());
  if (out.numel() == 0) return out;
  const at::Tensor dense[] = {rows.contiguous(), weight.contiguous(), bias.contiguous()};
  RowsLinear linear{dense[0].const_data_ptr<float>(), dense[1].const_data_ptr<float>(),
                    dense[2].const_data_ptr<float>(), rows.size(0), rows.size(1), rows.size(2),
                    weight.size(1)};
  std::copy_n(linear.bias, linear.num_columns, linear.starts.data());
  if (!linear.has_few_columns())
    share_out(linear.num_groups * linear.num_blocks, [&](int64_t item, int64_t) {
      linear.pack(item / linear.num_blocks, item % linear.num_blocks);
    });
  float* data = out.data_ptr<float>();
  const int64_t row_blocks = (linear.num_rows + kBlock - 1) / kBlock;
  share_out(linear.num_groups * row_blocks, [&](int64_t task, int64_t) {
    const int64_t group = task / row_blocks, first = task % row_blocks * kBlock;
    const int64_t end = std::min<int64_t>(first + kBlock, linear.num_rows);
    linear.has_few_columns() ? linear.run_few(group, first, end, data)
                             : linear.run(group, first, end, data);
  });
  return out;
}

at::Tensor rows_linear_shape(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor&) {
  return rows.new_empty_symint({rows.sym_size(0), rows.sym_size(1), weight.sym_size(1)});
}

Pair history_shapes(HISTORY_ARGUMENTS) {
  return {at::empty_like(queries), queries.new_empty_symint(queries.sym_sizes().slice(0, 2))};
}

Pair candidate_shapes(CANDIDATE_ARGUMENTS) {
  return {at::empty_like(queries), queries.new_empty_symint(queries.sym_sizes().slice(0, 3))};
}

Three history_backward_shapes(SAVED_ARGUMENTS, HISTORY_ARGUMENTS) {
  return {at::empty_like(queries), at::empty_like(keys), at::empty_like(values)};
}

Seven candidate_backward_shapes(SAVED_ARGUMENTS, CANDIDATE_ARGUMENTS) {
  return {at::empty_like(queries), at::empty_like(own_keys),  at::empty_like(own_values),
          at::empty_like(keys),    at::empty_like(values),    at::empty_like(time_bias),
          at::empty_like(place_bias)};
}

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct HistoryAttention : Function<HistoryAttention> {
  static variable_list forward(AutogradContext* context, HISTORY_ARGUMENTS) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, log_sums] =
        find<Pair(HISTORY_ARGUMENTS)>("torchrec_kvshare::history_attention").call(HISTORY_VALUES);
    context->save_for_backward({out, log_sums, queries, query_offsets, keys, values, key_offsets,
                                cached_keys, cached_values, page_ids, page_offsets,
                                cached_offsets});
    context->saved_data["window"] = window;
    context->saved_data["num_globals"] = num_globals;
    context->saved_data["scoring"] = std::string(scoring);
    context->mark_non_differentiable({log_sums});
    return {out, log_sums};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const std::string scoring = context->saved_data["scoring"].toStringRef();
    const auto [queries, keys, values] =
        find<Three(SAVED_ARGUMENTS, HISTORY_ARGUMENTS)>(
            "torchrec_kvshare::history_attention_backward")
            .call(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                  saved[6], saved[7], saved[8], saved[9], saved[10], saved[11],
                  context->saved_data["window"].toInt(),
                  context->saved_data["num_globals"].toInt(), scoring);
    variable_list all(13);
    all[0] = queries, all[2] = keys, all[3] = values;
    return all;
  }
};

struct CandidateAttention : Function<CandidateAttention> {
  static variable_list forward(AutogradContext* context, CANDIDATE_ARGUMENTS) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, log_sums] =
        find<Pair(CANDIDATE_ARGUMENTS)>("torchrec_kvshare::candidate_attention")
            .call(CANDIDATE_VALUES);
    context->save_for_backward({out, log_sums, queries, own_keys, own_values, candidate_offsets,
                                keys, values, page_ids, page_offsets, row_offsets, row_times,
                                candidate_times, visible_rows, time_bias, place_bias});
    context->saved_data["window"] = window;
    context->saved_data["scoring"] = std::string(scoring);
    context->mark_non_differentiable({log_sums});
    return {out, log_sums};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const std::string scoring = context->saved_data["scoring"].toStringRef();
    const auto [queries, own_keys, own_values, keys, values, time_bias, place_bias] =
        find<Seven(SAVED_ARGUMENTS, CANDIDATE_ARGUMENTS)>(
            "torchrec_kvshare::candidate_attention_backward")
            .call(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                  saved[6], saved[7], saved[8], saved[9], saved[10], saved[11], saved[12],
                  saved[13], saved[14], saved[15], context->saved_data["window"].toInt(), scoring);
    variable_list all(16);
    all[0] = queries, all[1] = own_keys, all[2] = own_values, all[4] = keys, all[5] = values;
    all[12] = time_bias, all[13] = place_bias;
    return all;
  }
};

Pair differentiable_history_attention(HISTORY_ARGUMENTS) {
  const variable_list results = HistoryAttention::apply(HISTORY_VALUES);
  return {results[0], results[1]};
}

Pair differentiable_candidate_attention(CANDIDATE_ARGUMENTS) {
  const variable_list results = CandidateAttention::apply(CANDIDATE_VALUES);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY(torchrec_kvshare, library) {
  const std::string history =
      "Tensor queries, Tensor query_offsets, Tensor keys, Tensor values, Tensor key_offsets, "
      "Tensor cached_keys, Tensor cached_values, Tensor page_ids, Tensor page_offsets, "
      "Tensor cached_offsets, int window, int num_globals, str scoring)";
  const std::string candidates =
      "Tensor queries, Tensor own_keys, Tensor own_values, Tensor candidate_offsets, Tensor keys, "
      "Tensor values, Tensor page_ids, Tensor page_offsets, Tensor row_offsets, Tensor row_times, "
      "Tensor candidate_times, Tensor visible_rows, Tensor time_bias, Tensor place_bias, "
      "int window, str scoring)";
  const std::string saved = "Tensor out_gradient, Tensor out, Tensor log_sums, ";
  const std::string two = " -> (Tensor, Tensor)", three = " -> (Tensor, Tensor, Tensor)";
  const std::string seven = " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
  for (const std::string& schema :
       {"history_attention(" + history + two, "candidate_attention(" + candidates + two,
        "history_attention_backward(" + saved + history + three,
        "candidate_attention_backward(" + saved + candidates + seven})
    library.def(schema.c_str());
  library.def("rows_linear(Tensor rows, Tensor weight, Tensor bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchrec_kvshare, CPU, library) {
  library.impl("history_attention", &history_attention);
  library.impl("candidate_attention", &candidate_attention);
  library.impl("history_attention_backward", &history_attention_backward);
  library.impl("candidate_attention_backward", &candidate_attention_backward);
  library.impl("rows_linear", &rows_linear);
}

TORCH_LIBRARY_IMPL(torchrec_kvshare, Meta, library) {
  library.impl("history_attention", &history_shapes);
  library.impl("candidate_attention", &candidate_shapes);
  library.impl("history_attention_backward", &history_backward_shapes);
  library.impl("candidate_attention_backward", &candidate_backward_shapes);
  library.impl("rows_linear", &rows_linear_shape);
}

TORCH_LIBRARY_IMPL(torchrec_kvshare, Autograd, library) {
  library.impl("history_attention", &differentiable_history_attention);
  library.impl("candidate_attention", &differentiable_candidate_attention);
}
