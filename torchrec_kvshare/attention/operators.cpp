// Attention of jagged users on a CPU, softmax and SiLU, forward and backward. See
// attention/operators.py for meaning and arguments.
//
// Keys and values are packed into blocks of 64. A forward task is one head of up to 128 queries of
// one user. It loops over the blocks and, for each block, over tiles of queries, so that the block
// stays in the core's L1 cache and scores never leave it. A row's result depends only on that row
// and its keys, to the bit: tiles are padded with zeros, and every row is rescaled on its own.
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
constexpr int kTile = 8;  // queries per tile: their sums fill half of the registers
#else
constexpr int kLanes = 8;
constexpr int kTile = 4;
#endif
constexpr int kPair = 2 * kLanes;
constexpr int kBlock = 64;  // keys per block: 16 KiB with values, for heads of 32
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

#ifdef __AVX512F__
constexpr IntVec kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr IntVec kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

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

// Exchanges the off-diagonal blocks of `step` lanes between two rows of a matrix.
template <size_t step, size_t... lane>
inline void exchange(Vec& above, Vec& below, std::index_sequence<lane...>) {
  const BitVec of_above = {static_cast<uint32_t>(lane & step ? kLanes + lane - step : lane)...};
  const BitVec of_below = {static_cast<uint32_t>(lane & step ? kLanes + lane : lane + step)...};
  const Vec first = __builtin_shuffle(above, below, of_above);
  below = __builtin_shuffle(above, below, of_below);
  above = first;
}

// Transposes rows [kLanes, kLanes], in blocks of 1, 2, 4 and so on.
template <size_t step = 1>
inline void transpose(Vec* rows) {
  for (size_t row = 0; row < kLanes; ++row)
    if (!(row & step))
      exchange<step>(rows[row], rows[row + step], std::make_index_sequence<kLanes>());
  if constexpr (2 * step < kLanes) transpose<2 * step>(rows);
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

// A matrix: its first element, and the strides to the next row and the next column.
struct Matrix {
  const float* data;
  int64_t row_step, column_step;
};

// sums [kTile, columns] = start + left [kTile, depth] times right [depth, columns]. `start` gives
// the initial sums of each row, and may be the sums themselves.
template <typename Start>
__attribute__((always_inline)) inline void multiply(const Matrix& left, int64_t depth, const float* right, int64_t columns,
                     const Start& start, float* sums_of_rows) {
  for (int64_t column = 0; column < columns; column += kPair) {
    Vec sums[kTile][2];
    for (int row = 0; row < kTile; ++row) {
      sums[row][0] = load(start(row) + column);
      sums[row][1] = load(start(row) + column + kLanes);
    }
    const float* from = right + column;
    for (int64_t step = 0; step < depth; ++step, from += columns) {
      const Vec low = load(from), high = load(from + kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kTile; ++row) {
        const Vec factor = all(left.data[row * left.row_step + step * left.column_step]);
        sums[row][0] += factor * low;
        sums[row][1] += factor * high;
      }
    }
    for (int row = 0; row < kTile; ++row) {
      store(sums_of_rows + row * columns + column, sums[row][0]);
      store(sums_of_rows + row * columns + column + kLanes, sums[row][1]);
    }
  }
}

// sums [kTile, columns] += left times right.
__attribute__((always_inline)) inline void multiply_add(const Matrix& left, int64_t depth, const float* right, int64_t columns,
                         float* sums) {
  multiply(left, depth, right, columns, [=](int row) { return sums + row * columns; }, sums);
}

struct Sizes {
  int64_t num_heads, dim, padded_dim;
  Sizes(int64_t num_heads, int64_t dim)
      : num_heads(num_heads), dim(dim), padded_dim((dim + kPair - 1) / kPair * kPair) {}
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
  int64_t first_key;    // in all users' rows
  int64_t first_block;  // in all users' packed blocks
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
  const float* key(const User& user, int64_t row, int64_t head) const {
    const auto [is_cached, page, place] = find(user, row);
    return (is_cached ? cached_keys : new_keys).at(page, place, head);
  }
  const float* value(const User& user, int64_t row, int64_t head) const {
    const auto [is_cached, page, place] = find(user, row);
    return (is_cached ? cached_values : new_values).at(page, place, head);
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

// The scaled biases of a tile's queries for a block of keys. Queries with equal time and visibility
// share them.
struct BlockBias {
  const Problem& problem;
  const Span& span;
  float factor;
  std::vector<float> times, places;  // the head's column of the tables, scaled
  int64_t block = -1, time = 0, visible = 0;
  int slot = 0;
  float values[kTile + 1][kBlock];

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

  // Fills pointers to kBlock values for each query of a tile. The last query's values are kept for
  // the next tile.
  void fill(int64_t first_query, int64_t last_query, bool is_one_moment, int64_t of_block,
            const float** rows) {
    if (problem.bias.is_none()) {
      std::fill_n(rows, kTile, kNoBias);
      return;
    }
    const int kept = slot;
    for (int row = 0; row < kTile; ++row) {
      if (is_one_moment && row > 0) {
        rows[row] = rows[0];
        continue;
      }
      const int64_t query = std::min(first_query + row, last_query);
      const int64_t candidate = (span.user.first_query + query) / problem.sight.num_tokens;
      const int64_t its_time = problem.bias.candidate_times[candidate];
      const int64_t its_visible = problem.sight.visible[candidate];
      if (of_block != block || its_time != time || its_visible != visible) {
        block = of_block, time = its_time, visible = its_visible;
        slot = (slot + 1) % (kTile + 1);
        if (slot == kept) slot = (slot + 1) % (kTile + 1);
        compute(values[slot]);
      }
      rows[row] = values[slot];
    }
  }

  void compute(float* to) const {
    const int64_t first = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, span.user.num_keys() - first);
    const int64_t* row_times = problem.bias.row_times + span.user.first_key + first;
    for (int64_t key = 0; key < count; ++key) {
      const auto [of_time, of_place] = buckets(row_times[key], first + key);
      to[key] = of_time < 0 ? 0.0f : times[of_time];
      if (of_place >= 0) to[key] += places[of_place];
    }
    std::fill_n(to + count, kBlock - count, 0.0f);
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

// A number of lanes, clamped to [0, kLanes], in every lane.
inline IntVec clamped(int64_t lanes) {
  return static_cast<int32_t>(std::clamp<int64_t>(lanes, 0, kLanes)) - IntVec{};
}

void hide_unseen(const Problem& problem, const Span& span, int64_t first_query, int64_t last_query,
                 int64_t first_key, float hidden, float* scores) {
  for (int row = 0; row < kTile; ++row) {
    const auto [first, end] =
        problem.sight.seen(span.user, std::min(first_query + row, last_query));
    for (int64_t key = 0; key < kBlock; key += kLanes) {
      const int64_t from = first - first_key - key, to = end - first_key - key;
      if (from <= 0 && to >= kLanes) continue;
      const auto is_seen = (kLaneNumbers >= clamped(from)) & (kLaneNumbers < clamped(to));
      float* place = scores + row * kBlock + key;
      store(place, is_seen ? load(place) : all(hidden));
    }
  }
}

inline Vec highest_score(const float* scores) {
  Vec highest = load(scores);
  for (int key = kLanes; key < kBlock; key += kLanes) highest = larger(highest, load(scores + key));
  return highest;
}

// State of a running softmax, or SiLU sum, of some queries.
struct Running {
  float* queries;     // [rows, D], scaled
  float* sums;        // [rows, padded D]
  float* totals;      // [rows, kLanes], partial sums of the weights
  float* references;  // [rows], subtracted from scores before the exponential
};

void raise_references(const float* scores, int64_t padded_dim, const Running& tile) {
  for (int row = 0; row < kTile; ++row) {
    const float highest = highest_of(highest_score(scores + row * kBlock));
    if (highest <= tile.references[row] + kSlack) continue;
    const Vec factor = exp2(all(tile.references[row] - highest));
    tile.references[row] = highest;
    float* totals = tile.totals + row * kLanes;
    store(totals, load(totals) * factor);
    float* sums = tile.sums + row * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += kLanes) store(sums + d, load(sums + d) * factor);
  }
}

struct Softmax {
  static constexpr float kScale = kLog2E;  // scores are exponents of 2
  // Less than the reference of a row that has seen no key yet.
  static constexpr float kHidden = -INFINITY;

  // The running softmax starts with the own tokens, so that nothing has to be merged afterwards.
  static void open(std::vector<float>& weights, float* totals, float* reference) {
    *reference = *std::max_element(weights.begin(), weights.end());
    for (float& weight : weights) totals[0] += weight = std::exp2(weight - *reference);
  }
  static void weigh(float* scores, int64_t padded_dim, const Running& tile) {
    Vec num_above{};  // A count, not a maximum: NaN of one row would hide a large score of another.
    for (int row = 0; row < kTile; ++row) {
      const Vec limit = all(tile.references[row] + kSlack);
      num_above += highest_score(scores + row * kBlock) <= limit ? Vec{} : all(1.0f);
    }
    if (highest_of(num_above) > 0.0f) raise_references(scores, padded_dim, tile);
    for (int row = 0; row < kTile; ++row, scores += kBlock) {
      const Vec reference = all(tile.references[row]);
      Vec total = load(tile.totals + row * kLanes);
      for (int key = 0; key < kBlock; key += kLanes) {
        const Vec weight = exp2(load(scores + key) - reference);
        store(scores + key, weight);
        total += weight;
      }
      store(tile.totals + row * kLanes, total);
    }
  }
  static float share(const float* totals) { return 1.0f / sum_of(load(totals)); }
  // In base 2, as the scores are in the backward pass.
  static float log_sum(const float* totals, float reference) {
    return reference + std::log2(sum_of(load(totals)));
  }
  // Computes weights from scores, and gradients of scores from gradients of weights.
  static void backward(Vec score, Vec weight_gradient, float log_sum, float delta, Vec* weight,
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
  static void weigh(float* scores, int64_t, const Running&) {
    for (int place = 0; place < kTile * kBlock; place += kLanes) {
      const Vec value = load(scores + place);
      store(scores + place, value * sigmoid(value));
    }
  }
  static float share(const float*) { return 1.0f; }
  static float log_sum(const float*, float) { return 0.0f; }
  static void backward(Vec score, Vec weight_gradient, float, float, Vec* weight, Vec* gradient) {
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

// Packs a block of rows as [D, kBlock], padded with zeros.
template <typename RowAt>
void pack_columns(const RowAt& row_at, int64_t count, int64_t dim, float* block) {
  if (count < kBlock) std::fill_n(block, dim * kBlock, 0.0f);
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t num_rows = std::min<int64_t>(kLanes, count - first);
    const float* from[kLanes];
    for (int64_t row = 0; row < num_rows; ++row) from[row] = row_at(first + row);
    int64_t d = 0;
    for (; num_rows == kLanes && d + kLanes <= dim; d += kLanes) {
      Vec rows[kLanes];
      for (int row = 0; row < kLanes; ++row) rows[row] = load(from[row] + d);
      transpose(rows);
      for (int row = 0; row < kLanes; ++row) store(block + (d + row) * kBlock + first, rows[row]);
    }
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t rest = d; rest < dim; ++rest) block[rest * kBlock + first + row] = from[row][rest];
  }
}

// Packs a block of rows as [kBlock, padded D], padded with zeros.
template <typename RowAt>
void pack_rows(const RowAt& row_at, int64_t count, const Sizes& sizes, float* block) {
  if (count < kBlock || sizes.dim < sizes.padded_dim)
    std::fill_n(block, kBlock * sizes.padded_dim, 0.0f);
  for (int64_t row = 0; row < count; ++row)
    std::copy_n(row_at(row), sizes.dim, block + row * sizes.padded_dim);
}

inline bool are_finite(const float* numbers, int64_t count) {
  Vec total{};
  for (int64_t place = 0; place < count; place += kLanes) total += load(numbers + place) * 0.0f;
  return sum_of(total) == 0.0f;
}

// Packed keys [blocks, H, D, kBlock] and values [blocks, H, kBlock, padded D] of all users.
struct Packed {
  at::Tensor keys, values;
  std::vector<char> has_finite_values;  // [blocks, H]

  explicit Packed(Problem& problem) {
    int64_t num_blocks = 0;
    for (User& user : problem.users) {
      user.first_block = num_blocks;
      num_blocks += user.num_blocks();
    }
    const Sizes& sizes = problem.sizes;
    const auto options = problem.queries.tensor.options();
    // Allocated before the list of blocks, so that too large a request fails here.
    keys = at::empty({num_blocks, sizes.num_heads, sizes.dim, kBlock}, options);
    values = at::empty({num_blocks, sizes.num_heads, kBlock, sizes.padded_dim}, options);
    float *key_data = keys.data_ptr<float>(), *value_data = values.data_ptr<float>();
    has_finite_values.resize(num_blocks * sizes.num_heads);
    std::vector<std::tuple<const User*, int64_t>> blocks;
    blocks.reserve(num_blocks);
    for (const User& user : problem.users)
      for (int64_t first = 0; first < user.num_keys(); first += kBlock)
        blocks.emplace_back(&user, first);
    const History& history = problem.history;
    share_out(num_blocks, [&](int64_t block, int64_t) {
      const User& user = *std::get<0>(blocks[block]);
      const int64_t first = std::get<1>(blocks[block]);
      const int64_t count = std::min<int64_t>(kBlock, user.num_keys() - first);
      for (int64_t head = 0; head < sizes.num_heads; ++head) {
        const int64_t packed = block * sizes.num_heads + head;
        pack_columns([&](int64_t row) { return history.key(user, first + row, head); }, count,
                     sizes.dim, key_data + packed * sizes.dim * kBlock);
        float* value_block = value_data + packed * sizes.padded_dim * kBlock;
        pack_rows([&](int64_t row) { return history.value(user, first + row, head); }, count, sizes,
                  value_block);
        has_finite_values[packed] = are_finite(value_block, kBlock * sizes.padded_dim);
      }
    });
  }
};

template <typename Scoring>
struct Forward {
  const Problem& problem;
  const float *key_blocks, *value_blocks;
  const char* has_finite_values;
  float *out, *log_sums;  // [tokens, H, D], [tokens, H]
  int64_t task_rows;      // maximum rows of a task, a multiple of kTile

  int64_t scratch_size() const {
    const Sizes& sizes = problem.sizes;
    return kTile * kBlock + task_rows * (sizes.dim + sizes.padded_dim + kLanes + 1);
  }

  void run(const Span& span, float* scratch) const {
    const Sizes& sizes = problem.sizes;
    float* scores = scratch;
    float* free = scratch + kTile * kBlock;
    const Running running{free, free + task_rows * sizes.dim,
                          free + task_rows * (sizes.dim + sizes.padded_dim),
                          free + task_rows * (sizes.dim + sizes.padded_dim + kLanes)};
    open(span, running);
    BlockBias bias(problem, span, Scoring::kScale);
    std::vector<Range> tiles;
    for (int64_t row = span.first; row < span.end; row += kTile)
      tiles.emplace_back(problem, span.user, row, std::min(row + kTile, span.end));
    int64_t first = INT64_MAX, end = 0;
    for (const Range& tile : tiles) {
      first = std::min(first, tile.first);
      end = std::max(end, tile.end);
    }
    for (int64_t block = first / kBlock; block * kBlock < end; ++block)
      for (size_t tile = 0; tile < tiles.size(); ++tile)
        add_block(span, bias, block, tile, tiles[tile], running, scores);
    close(span, running);
  }

  void add_block(const Span& span, BlockBias& bias, int64_t block, int64_t tile, const Range& seen,
                 const Running& running, float* scores) const {
    const Sizes& sizes = problem.sizes;
    const int64_t first_key = block * kBlock, end_key = first_key + kBlock;
    if (seen.end <= first_key || seen.first >= end_key) return;
    const int64_t place = tile * kTile, first_query = span.first + place;
    const int64_t last_query = std::min(first_query + kTile, span.end) - 1;
    const Running rows{running.queries + place * sizes.dim, running.sums + place * sizes.padded_dim,
                       running.totals + place * kLanes, running.references + place};
    const int64_t packed = (span.user.first_block + block) * sizes.num_heads + span.head;
    const float* biases[kTile];
    bias.fill(first_query, last_query, seen.is_one_moment, block, biases);
    multiply({rows.queries, sizes.dim, 1}, sizes.dim, key_blocks + packed * sizes.dim * kBlock,
             kBlock, [&](int row) { return biases[row]; }, scores);
    const bool hides = seen.all_first > first_key || seen.all_end < end_key;
    if (hides)
      hide_unseen(problem, span, first_query, last_query, first_key, Scoring::kHidden, scores);
    Scoring::weigh(scores, sizes.padded_dim, rows);
    const float* values = value_blocks + packed * sizes.padded_dim * kBlock;
    if (hides && !has_finite_values[packed])
      add_seen(span, first_query, last_query, first_key, scores, values, rows.sums);
    else
      multiply_add({scores, kBlock, 1}, kBlock, values, sizes.padded_dim, rows.sums);
  }

  // The product with the visible rows only: a hidden row weighs zero, and zero times NaN is NaN.
  void add_seen(const Span& span, int64_t first_query, int64_t last_query, int64_t first_key,
                const float* weights, const float* values, float* sums) const {
    const int64_t padded_dim = problem.sizes.padded_dim;
    for (int64_t query = first_query; query <= last_query; ++query) {
      const auto [first, end] = problem.sight.seen(span.user, query);
      const int64_t place = query - first_query;
      for (int64_t key = 0; key < kBlock; ++key)
        if (first <= first_key + key && first_key + key < end)
          add_scaled(values + key * padded_dim, weights[place * kBlock + key], padded_dim,
                     sums + place * padded_dim);
    }
  }

  void open(const Span& span, const Running& running) const {
    const Sizes& sizes = problem.sizes;
    std::fill_n(running.queries, task_rows * sizes.dim, 0.0f);
    std::fill_n(running.sums, task_rows * sizes.padded_dim, 0.0f);
    std::fill_n(running.totals, task_rows * kLanes, 0.0f);
    std::fill_n(running.references, task_rows, kUnseen);
    const float scale = Scoring::kScale * sizes.scale();
    const int64_t num_tokens = problem.sight.num_tokens;
    std::vector<float> weights(num_tokens);
    for (int64_t place = 0; place < span.end - span.first; ++place) {
      const int64_t token = span.user.first_query + span.first + place;
      const float* from = problem.queries.at(token, 0, span.head);
      float* query = running.queries + place * sizes.dim;
      for (int64_t d = 0; d < sizes.dim; ++d) query[d] = from[d] * scale;
      if (!problem.has_own) continue;
      const int64_t first_own = token / num_tokens * num_tokens;
      for (int64_t own = 0; own < num_tokens; ++own)
        weights[own] = dot(query, problem.own_keys.at(first_own + own, 0, span.head), sizes.dim);
      Scoring::open(weights, running.totals + place * kLanes, running.references + place);
      for (int64_t own = 0; own < num_tokens; ++own)
        add_scaled(problem.own_values.at(first_own + own, 0, span.head), weights[own], sizes.dim,
                   running.sums + place * sizes.padded_dim);
    }
  }

  void close(const Span& span, const Running& running) const {
    const Sizes& sizes = problem.sizes;
    for (int64_t place = 0; place < span.end - span.first; ++place) {
      const int64_t token = span.user.first_query + span.first + place;
      const float* totals = running.totals + place * kLanes;
      const float share = Scoring::share(totals);
      const float* sums = running.sums + place * sizes.padded_dim;
      float* to = out + (token * sizes.num_heads + span.head) * sizes.dim;
      for (int64_t d = 0; d < sizes.dim; ++d) to[d] = sums[d] * share;
      log_sums[token * sizes.num_heads + span.head] =
          Scoring::log_sum(totals, running.references[place]);
    }
  }
};

template <typename Scoring>
std::tuple<at::Tensor, at::Tensor> forward(Problem& problem) {
  const Sizes& sizes = problem.sizes;
  const auto options = problem.queries.tensor.options();
  const int64_t num_tokens = problem.queries.tensor.size(0);
  at::Tensor out = at::empty({num_tokens, sizes.num_heads, sizes.dim}, options);
  at::Tensor log_sums = at::empty({num_tokens, sizes.num_heads}, options);
  if (out.numel() == 0) return {out, log_sums.zero_()};
  const int64_t num_queries = problem.num_queries();
  out.slice(0, num_queries).zero_();
  log_sums.slice(0, num_queries).zero_();
  const Packed packed(problem);
  int64_t most_queries = 0;
  for (const User& user : problem.users) most_queries = std::max(most_queries, user.num_queries);
  const int64_t task_rows = std::min<int64_t>(kTaskRows, (most_queries + kTile - 1) / kTile * kTile);
  std::vector<Span> tasks;
  for (const User& user : problem.users)
    // The last rows of a history see most rows, so they are the longest tasks: they go first.
    for (int64_t end = user.num_queries; end > 0; end -= task_rows)
      for (int64_t head = 0; head < sizes.num_heads; ++head)
        tasks.push_back({user, head, std::max<int64_t>(0, end - task_rows), end});
  const Forward<Scoring> attention{problem, packed.keys.const_data_ptr<float>(),
                                   packed.values.const_data_ptr<float>(),
                                   packed.has_finite_values.data(), out.data_ptr<float>(),
                                   log_sums.data_ptr<float>(), task_rows};
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

// One head of one user: for each block of its rows, all queries in blocks of kBlock.
template <typename Scoring>
struct Backward {
  const Problem& problem;
  Pages out_gradient;  // [tokens, 1, H, D]
  Pages out;
  const float* log_sums;  // [tokens, H]
  Gradients& gradients;

  void run(int64_t place, int64_t head) const {
    const User& user = problem.users[place];
    const Sizes& sizes = problem.sizes;
    const Span span{user, head, 0, user.num_queries};
    const int64_t num_blocks = (user.num_queries + kBlock - 1) / kBlock;
    const int64_t padded = num_blocks * kBlock * sizes.padded_dim;
    std::vector<float> queries(padded, 0.0f), outs(padded, 0.0f), sums(padded, 0.0f);
    std::vector<float> deltas(num_blocks * kBlock, 0.0f), logs(num_blocks * kBlock, 0.0f);
    for (int64_t query = 0; query < user.num_queries; ++query) {
      const int64_t token = user.first_query + query;
      const float* gradient = out_gradient.at(token, 0, head);
      float* scaled = queries.data() + query * sizes.padded_dim;
      add_scaled(problem.queries.at(token, 0, head), sizes.scale(), sizes.dim, scaled);
      std::copy_n(gradient, sizes.dim, outs.data() + query * sizes.padded_dim);
      deltas[query] = dot(gradient, out.at(token, 0, head), sizes.dim);
      logs[query] = log_sums[token * sizes.num_heads + head];
    }
    if (problem.has_own) own_tokens(span, queries, outs, deltas, logs, sums);
    Scratch scratch(sizes);
    BlockBias bias(problem, span, 1.0f);  // kScale is applied after the product.
    float* tables = Gradients::at(gradients.tables, place, head);
    for (int64_t block = 0; block < user.num_blocks(); ++block) {
      scratch.load(problem, span, block);
      for (int64_t first = 0; first < user.num_queries; first += kBlock) {
        const int64_t end = std::min(first + kBlock, user.num_queries);
        const Range seen(problem, user, first, end);
        if (seen.end <= block * kBlock || seen.first >= (block + 1) * kBlock) continue;
        const int64_t at = first * sizes.padded_dim;
        scores(span, first, end, block, bias, queries.data() + at, outs.data() + at,
               deltas.data() + first, logs.data() + first, scratch, tables);
        scratch.multiply_all(sizes, queries.data() + at, outs.data() + at, sums.data() + at);
      }
      scratch.save(sizes, span, block, gradients);
    }
    for (int64_t query = 0; query < user.num_queries; ++query)
      add_scaled(sums.data() + query * sizes.padded_dim, sizes.scale(), sizes.dim,
                 Gradients::at(gradients.queries, user.first_query + query, head));
  }

  // A block of rows, its gradients, and the weights of a block of queries on these rows.
  struct Scratch {
    std::vector<float> key_columns, value_columns, key_rows, key_sums, value_sums;
    std::vector<float> weights, gradients;  // [kBlock queries, kBlock keys]

    explicit Scratch(const Sizes& sizes)
        : key_columns(sizes.dim * kBlock),
          value_columns(sizes.dim * kBlock),
          key_rows(kBlock * sizes.padded_dim),
          key_sums(kBlock * sizes.padded_dim),
          value_sums(kBlock * sizes.padded_dim),
          weights(kBlock * kBlock),
          gradients(kBlock * kBlock) {}

    void load(const Problem& problem, const Span& span, int64_t block) {
      const int64_t first = block * kBlock;
      const int64_t count = std::min<int64_t>(kBlock, span.user.num_keys() - first);
      const auto key = [&](int64_t row) {
        return problem.history.key(span.user, first + row, span.head);
      };
      const auto value = [&](int64_t row) {
        return problem.history.value(span.user, first + row, span.head);
      };
      pack_columns(key, count, problem.sizes.dim, key_columns.data());
      pack_columns(value, count, problem.sizes.dim, value_columns.data());
      pack_rows(key, count, problem.sizes, key_rows.data());
      std::fill(key_sums.begin(), key_sums.end(), 0.0f);
      std::fill(value_sums.begin(), value_sums.end(), 0.0f);
    }

    void multiply_all(const Sizes& sizes, const float* queries, const float* outs, float* sums) {
      const int64_t columns = sizes.padded_dim;
      for (int64_t row = 0; row < kBlock; row += kTile) {
        multiply_add({gradients.data() + row * kBlock, kBlock, 1}, kBlock, key_rows.data(), columns,
                     sums + row * columns);
        multiply_add({gradients.data() + row, 1, kBlock}, kBlock, queries, columns,
                     key_sums.data() + row * columns);
        multiply_add({weights.data() + row, 1, kBlock}, kBlock, outs, columns,
                     value_sums.data() + row * columns);
      }
    }

    void save(const Sizes& sizes, const Span& span, int64_t block, Gradients& gradients) const {
      const int64_t first = block * kBlock;
      const int64_t count = std::min<int64_t>(kBlock, span.user.num_keys() - first);
      for (int64_t row = 0; row < count; ++row) {
        const int64_t key = span.user.first_key + first + row;
        std::copy_n(key_sums.data() + row * sizes.padded_dim, sizes.dim,
                    Gradients::at(gradients.keys, key, span.head));
        std::copy_n(value_sums.data() + row * sizes.padded_dim, sizes.dim,
                    Gradients::at(gradients.values, key, span.head));
      }
    }
  };

  // Computes the weights of a block of queries on a block of keys, and the scores' gradients.
  void scores(const Span& span, int64_t first, int64_t end, int64_t block, BlockBias& bias,
              const float* queries, const float* outs, const float* deltas, const float* logs,
              Scratch& scratch, float* tables) const {
    const Sizes& sizes = problem.sizes;
    float scores[kTile * kBlock], weight_gradients[kTile * kBlock];
    for (int64_t row = 0; row < kBlock; row += kTile) {
      float* weights = scratch.weights.data() + row * kBlock;
      float* gradients = scratch.gradients.data() + row * kBlock;
      if (first + row >= end) {
        std::fill_n(weights, kTile * kBlock, 0.0f);
        std::fill_n(gradients, kTile * kBlock, 0.0f);
        continue;
      }
      const int64_t last = std::min(first + row + kTile, end) - 1;
      const float* biases[kTile];
      bias.fill(first + row, last, false, block, biases);
      multiply({queries + row * sizes.padded_dim, sizes.padded_dim, 1}, sizes.dim,
               scratch.key_columns.data(), kBlock, [&](int r) { return biases[r]; }, scores);
      multiply({outs + row * sizes.padded_dim, sizes.padded_dim, 1}, sizes.dim,
               scratch.value_columns.data(), kBlock, [](int) { return kNoBias; },
               weight_gradients);
      for (int tile_row = 0; tile_row < kTile; ++tile_row)
        for (int key = tile_row * kBlock; key < (tile_row + 1) * kBlock; key += kLanes) {
          Vec weight, gradient;
          Scoring::backward(load(scores + key) * Scoring::kScale, load(weight_gradients + key),
                            logs[row + tile_row], deltas[row + tile_row], &weight, &gradient);
          store(weights + key, weight);
          store(gradients + key, gradient);
        }
      hide_unseen(problem, span, first + row, last, block * kBlock, 0.0f, weights);
      hide_unseen(problem, span, first + row, last, block * kBlock, 0.0f, gradients);
      for (int64_t padding = last + 1 - first - row; padding < kTile; ++padding) {
        std::fill_n(weights + padding * kBlock, kBlock, 0.0f);
        std::fill_n(gradients + padding * kBlock, kBlock, 0.0f);
      }
      add_to_tables(span, first + row, last, block, bias, gradients, tables);
    }
  }

  void add_to_tables(const Span& span, int64_t first, int64_t last, int64_t block, BlockBias& bias,
                     const float* gradients, float* tables) const {
    if (problem.bias.is_none()) return;
    const int64_t first_key = block * kBlock;
    const int64_t count = std::min<int64_t>(kBlock, span.user.num_keys() - first_key);
    const int64_t* row_times = problem.bias.row_times + span.user.first_key + first_key;
    for (int64_t query = first; query <= last; ++query) {
      const int64_t candidate = (span.user.first_query + query) / problem.sight.num_tokens;
      bias.time = problem.bias.candidate_times[candidate];
      bias.visible = problem.sight.visible[candidate];
      for (int64_t key = 0; key < count; ++key) {
        const float gradient = gradients[(query - first) * kBlock + key];
        if (gradient == 0.0f) continue;
        const auto [of_time, of_place] = bias.buckets(row_times[key], first_key + key);
        if (of_time >= 0) tables[of_time] += gradient;
        if (of_place >= 0) tables[problem.bias.num_times + of_place] += gradient;
      }
    }
    bias.block = -1;  // Its time and visibility have changed.
  }

  void own_tokens(const Span& span, const std::vector<float>& queries,
                  const std::vector<float>& outs, const std::vector<float>& deltas,
                  const std::vector<float>& logs, std::vector<float>& sums) const {
    const Sizes& sizes = problem.sizes;
    const int64_t num_tokens = problem.sight.num_tokens;
    for (int64_t query = 0; query < span.end; ++query) {
      const int64_t token = span.user.first_query + query;
      const float* scaled = queries.data() + query * sizes.padded_dim;
      const float* gradient = outs.data() + query * sizes.padded_dim;
      const int64_t first_own = token / num_tokens * num_tokens;
      for (int64_t own = first_own; own < first_own + num_tokens; ++own) {
        const float* key = problem.own_keys.at(own, 0, span.head);
        const float* value = problem.own_values.at(own, 0, span.head);
        Vec weight, score_gradient;
        Scoring::backward(all(dot(scaled, key, sizes.dim) * Scoring::kScale),
                          all(dot(gradient, value, sizes.dim)), logs[query], deltas[query], &weight,
                          &score_gradient);
        add_scaled(gradient, weight[0], sizes.dim,
                   Gradients::at(gradients.own_values, own, span.head));
        add_scaled(scaled, score_gradient[0], sizes.dim,
                   Gradients::at(gradients.own_keys, own, span.head));
        add_scaled(key, score_gradient[0], sizes.dim, sums.data() + query * sizes.padded_dim);
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
                             fresh[user], num_new, cached[user] + fresh[user], 0});
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
                             0, 0, rows[user], 0});
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
  Problem problem = history_problem(HISTORY_VALUES);
  return is_silu(scoring) ? forward<Silu>(problem) : forward<Softmax>(problem);
}

Pair candidate_attention(CANDIDATE_ARGUMENTS) {
  if (!is_ours(queries))
    return find<Pair(CANDIDATE_ARGUMENTS)>("torchrec_kvshare::plain_candidate_attention")
        .call(CANDIDATE_VALUES);
  Problem problem = candidate_problem(CANDIDATE_VALUES);
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
        multiply({from, depth, 1}, depth, packed_block(group, block), kPair,
                 [&](int) { return start; }, tile);
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
