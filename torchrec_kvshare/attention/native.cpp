// Attention of jagged users on a CPU, softmax and SiLU: the body `native` of attention/bodies.py.
//
// Keys and values are packed once into blocks of 64. A task is one head of up to 128 queries of one
// user; it walks over the blocks and, under each, over tiles of queries, so that the block stays in
// the core's first cache and no score ever leaves it. A row's result depends on that row and on its
// keys alone, to the bit: tiles are filled up with zeros, and every row rescales for itself.
// Running softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867).

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kTile = 8;  // Queries at once: their sums fill half of the registers.
#else
constexpr int kLanes = 8;
constexpr int kTile = 4;
#endif
constexpr int kPair = 2 * kLanes;
constexpr int kBlock = 64;  // Keys at once: with values, and heads of 32, 16 KiB.
constexpr int kTaskRows = 128;
constexpr float kUnseen = -1e30f;
constexpr float kSlack = 20.0f;  // A row rescales when a score is 2**20 times its reference.
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNoBias[kBlock] = {};

using Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = float;
using IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = int32_t;
using Spans = std::vector<std::tuple<int64_t, int64_t>>;

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
// Minus zero is free to the compiler; plus zero would be an addition.
inline Vec all(float value) { return value - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float sum_of(Vec value) {
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

inline float highest_of(Vec value) {
  float highest = value[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = std::max(highest, value[lane]);
  return highest;
}

// 2**x to 2e-7 of its value, exactly zero up to -127; a NaN stays one.
inline Vec exp2(Vec x) {
  x = x < -127.0f ? all(-127.0f) : x;
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2**23, which leaves no place for a fraction
  const Vec rest = x - (shifted - 12582912.0f);
  // Taylor series of 2**rest on [-0.5, 0.5].
  Vec power = all(1.5403530e-4f);
  power = power * rest + 1.3333558e-3f;
  power = power * rest + 9.6181291e-3f;
  power = power * rest + 5.5504109e-2f;
  power = power * rest + 2.4022651e-1f;
  power = power * rest + 6.9314718e-1f;
  power = power * rest + 1.0f;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(power) +
                               (reinterpret_cast<IntVec>(shifted) << 23));
}

inline float dot(const float* a, const float* b, int64_t dim) {
  Vec total{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) total += load(a + d) * load(b + d);
  float result = sum_of(total);
  for (; d < dim; ++d) result += a[d] * b[d];
  return result;
}

// A tensor [rows, H, D] whose heads are dense.
struct Rows {
  const float* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;

  Rows() = default;
  explicit Rows(const at::Tensor& tensor)
      : data(tensor.const_data_ptr<float>()),
        row_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)) {
    TORCH_CHECK(tensor.size(2) <= 1 || tensor.stride(2) == 1, "body native: heads must be dense");
  }
  const float* at(int64_t row, int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

// One user's rows, what they see, and where its packed blocks are.
struct User {
  int64_t first_row, num_rows, first_key, num_keys;
  bool causal = false;  // whether the rows are the last of the keys
  int64_t window = 0;   // keys that a causal row sees; 0 for all
  at::Tensor bias;      // [H, 1 or candidates, padded keys], or undefined
  int64_t first_block = 0;

  User(const std::tuple<int64_t, int64_t>& rows, const std::tuple<int64_t, int64_t>& keys)
      : first_row(std::get<0>(rows)),
        num_rows(std::get<1>(rows) - first_row),
        first_key(std::get<0>(keys)),
        num_keys(std::get<1>(keys) - first_key) {}
  int64_t num_blocks() const { return (num_keys + kBlock - 1) / kBlock; }
  int64_t end_seen(int64_t row) const { return causal ? num_keys - num_rows + row + 1 : num_keys; }
  int64_t first_seen(int64_t row) const {
    return window > 0 ? std::max<int64_t>(0, end_seen(row) - window) : 0;
  }
};

// Biases [H, 1 or candidates, padded keys] of one user; all zeros if it has none.
struct Bias {
  const float* data = nullptr;
  int64_t num_candidates = 0, num_keys = 0, num_tokens = 1;

  Bias(const at::Tensor& bias, int64_t num_tokens) : num_tokens(num_tokens) {
    if (!bias.defined()) return;
    data = bias.const_data_ptr<float>();
    num_candidates = bias.size(1);
    num_keys = bias.size(2);
  }
  const float* at(int64_t head, int64_t row, int64_t key) const {
    if (data == nullptr) return kNoBias;
    const int64_t candidate = num_candidates == 1 ? 0 : row / num_tokens;
    return data + (head * num_candidates + candidate) * num_keys + key;
  }
};

// A running softmax, or sum, of some queries.
struct Running {
  float* queries;     // [rows, D], scaled
  float* sums;        // [rows, padded D]
  float* totals;      // [rows, kLanes], to be summed
  float* references;  // [rows]: exponentials are taken of what a score is above it
};

struct Sizes {
  int64_t num_heads, dim, padded_dim;
  explicit Sizes(const at::Tensor& queries)
      : num_heads(queries.size(1)),
        dim(queries.size(2)),
        padded_dim((dim + kPair - 1) / kPair * kPair) {}
};

// Keys as [D, kBlock] and values as [kBlock, padded D], zeros where there are none.
void pack_block(const Rows& keys, const Rows& values, const Sizes& sizes, int64_t head,
                int64_t first, int64_t count, float* key_block, float* value_block) {
  if (count < kBlock) std::fill_n(key_block, sizes.dim * kBlock, 0.0f);
  std::fill_n(value_block, kBlock * sizes.padded_dim, 0.0f);
  for (int64_t key = 0; key < count; ++key) {
    const float* from = keys.at(first + key, head);
    for (int64_t d = 0; d < sizes.dim; ++d) key_block[d * kBlock + key] = from[d];
    std::copy_n(values.at(first + key, head), sizes.dim, value_block + key * sizes.padded_dim);
  }
}

// scores [kTile, kBlock] = queries [kTile, D] times a block of keys, plus each row's bias.
inline void score(const float* queries, int64_t dim, const float* key_block,
                  const float* const* biases, float* scores) {
  for (int column = 0; column < kBlock; column += kPair) {
    Vec sums[kTile][2];
    for (int row = 0; row < kTile; ++row) {
      sums[row][0] = load(biases[row] + column);
      sums[row][1] = load(biases[row] + column + kLanes);
    }
    const float* key = key_block + column;
    for (int64_t d = 0; d < dim; ++d, key += kBlock) {
      const Vec low = load(key), high = load(key + kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kTile; ++row) {
        const Vec query = all(queries[row * dim + d]);
        sums[row][0] += query * low;
        sums[row][1] += query * high;
      }
    }
    for (int row = 0; row < kTile; ++row) {
      store(scores + row * kBlock + column, sums[row][0]);
      store(scores + row * kBlock + column + kLanes, sums[row][1]);
    }
  }
}

// sums [kTile, padded D] += weights [kTile, kBlock] times a block of values.
inline void add_values(const float* weights, const float* value_block, int64_t padded_dim,
                       float* sums_of_rows) {
  for (int64_t column = 0; column < padded_dim; column += kPair) {
    Vec sums[kTile][2];
    for (int row = 0; row < kTile; ++row) {
      sums[row][0] = load(sums_of_rows + row * padded_dim + column);
      sums[row][1] = load(sums_of_rows + row * padded_dim + column + kLanes);
    }
    const float* value = value_block + column;
    for (int key = 0; key < kBlock; ++key, value += padded_dim) {
      const Vec low = load(value), high = load(value + kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kTile; ++row) {
        const Vec weight = all(weights[row * kBlock + key]);
        sums[row][0] += weight * low;
        sums[row][1] += weight * high;
      }
    }
    for (int row = 0; row < kTile; ++row) {
      store(sums_of_rows + row * padded_dim + column, sums[row][0]);
      store(sums_of_rows + row * padded_dim + column + kLanes, sums[row][1]);
    }
  }
}

void hide_unseen(const User& user, int64_t first_row, int64_t first_key, float hidden,
                 float* scores) {
  for (int row = 0; row < kTile; ++row) {
    const int64_t first = user.first_seen(first_row + row) - first_key;
    const int64_t end = user.end_seen(first_row + row) - first_key;
    for (int64_t key = 0; key < kBlock; ++key)
      if (key < first || key >= end) scores[row * kBlock + key] = hidden;
  }
}

inline Vec highest_score(const float* scores) {
  Vec highest = load(scores);
  for (int key = kLanes; key < kBlock; key += kLanes) highest = larger(highest, load(scores + key));
  return highest;
}

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
  static constexpr float kScale = kLog2E;  // Scores are exponents of 2.
  static constexpr float kHidden = kUnseen;

  // Own tokens open the running softmax, so that nothing has to be merged afterwards.
  static void open(std::vector<float>& weights, float* totals, float* reference) {
    *reference = *std::max_element(weights.begin(), weights.end());
    for (float& weight : weights) totals[0] += weight = std::exp2(weight - *reference);
  }
  static void weigh(float* scores, int64_t padded_dim, const Running& tile) {
    Vec excess = all(-1.0f);
    for (int row = 0; row < kTile; ++row) {
      const Vec limit = all(tile.references[row] + kSlack);
      excess = larger(excess, highest_score(scores + row * kBlock) - limit);
    }
    if (highest_of(excess) > 0.0f) raise_references(scores, padded_dim, tile);
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
      const Vec power = value * -kLog2E;
      store(scores + place, value / (exp2(power > 126.0f ? all(126.0f) : power) + 1.0f));
    }
  }
  static float share(const float*) { return 1.0f; }
};

struct Task {
  const User* user;
  int64_t head, first, end;  // rows of the user
};

template <typename Scoring>
struct Attention {
  Sizes sizes;
  Rows queries, own_keys, own_values;  // own_keys without data: rows open with nothing
  int64_t num_tokens;
  const float *key_blocks, *value_blocks;  // [blocks, H, ...]
  float* out;                              // [rows, H, D]

  int64_t scratch_size() const {
    return kTile * kBlock + kTaskRows * (sizes.dim + sizes.padded_dim + kLanes + 1);
  }

  void run(const Task& task, float* scratch) const {
    float* scores = scratch;
    float* free = scratch + kTile * kBlock;
    const Running running{free, free + kTaskRows * sizes.dim,
                          free + kTaskRows * (sizes.dim + sizes.padded_dim),
                          free + kTaskRows * (sizes.dim + sizes.padded_dim + kLanes)};
    open(task, running);
    const User& user = *task.user;
    const Bias bias(user.bias, num_tokens);
    const int64_t end_block = (user.end_seen(task.end - 1) + kBlock - 1) / kBlock;
    for (int64_t block = user.first_seen(task.first) / kBlock; block < end_block; ++block)
      for (int64_t row = task.first; row < task.end; row += kTile)
        add_block(task, bias, block, row, running, scores);
    close(task, running);
  }

  void add_block(const Task& task, const Bias& bias, int64_t block, int64_t first_row,
                 const Running& running, float* scores) const {
    const User& user = *task.user;
    const int64_t last_row = std::min(first_row + kTile, task.end) - 1;
    const int64_t first_key = block * kBlock, end_key = first_key + kBlock;
    if (user.end_seen(last_row) <= first_key || user.first_seen(first_row) >= end_key) return;
    const int64_t place = first_row - task.first;
    const Running tile{running.queries + place * sizes.dim, running.sums + place * sizes.padded_dim,
                       running.totals + place * kLanes, running.references + place};
    const int64_t packed = (user.first_block + block) * sizes.num_heads + task.head;
    const float* biases[kTile];
    for (int row = 0; row < kTile; ++row)
      biases[row] = bias.at(task.head, std::min(first_row + row, last_row), first_key);
    score(tile.queries, sizes.dim, key_blocks + packed * sizes.dim * kBlock, biases, scores);
    if (user.first_seen(last_row) > first_key || user.end_seen(first_row) < end_key)
      hide_unseen(user, first_row, first_key, Scoring::kHidden, scores);
    Scoring::weigh(scores, sizes.padded_dim, tile);
    add_values(scores, value_blocks + packed * sizes.padded_dim * kBlock, sizes.padded_dim,
               tile.sums);
  }

  void open(const Task& task, const Running& running) const {
    std::fill_n(running.queries, kTaskRows * sizes.dim, 0.0f);
    std::fill_n(running.sums, kTaskRows * sizes.padded_dim, 0.0f);
    std::fill_n(running.totals, kTaskRows * kLanes, 0.0f);
    std::fill_n(running.references, kTaskRows, kUnseen);
    const float scale = Scoring::kScale / std::sqrt(static_cast<float>(sizes.dim));
    std::vector<float> weights(num_tokens);
    for (int64_t place = 0; place < task.end - task.first; ++place) {
      const int64_t row = task.user->first_row + task.first + place;
      const float* from = queries.at(row, task.head);
      float* query = running.queries + place * sizes.dim;
      for (int64_t d = 0; d < sizes.dim; ++d) query[d] = from[d] * scale;
      if (own_keys.data == nullptr) continue;
      const int64_t first_own = row / num_tokens * num_tokens;
      for (int64_t token = 0; token < num_tokens; ++token)
        weights[token] = dot(query, own_keys.at(first_own + token, task.head), sizes.dim);
      Scoring::open(weights, running.totals + place * kLanes, running.references + place);
      float* sums = running.sums + place * sizes.padded_dim;
      for (int64_t token = 0; token < num_tokens; ++token) {
        const float* value = own_values.at(first_own + token, task.head);
        for (int64_t d = 0; d < sizes.dim; ++d) sums[d] += weights[token] * value[d];
      }
    }
  }

  void close(const Task& task, const Running& running) const {
    for (int64_t place = 0; place < task.end - task.first; ++place) {
      const int64_t row = task.user->first_row + task.first + place;
      const float* sums = running.sums + place * sizes.padded_dim;
      const float share = Scoring::share(running.totals + place * kLanes);
      float* to = out + (row * sizes.num_heads + task.head) * sizes.dim;
      for (int64_t d = 0; d < sizes.dim; ++d) to[d] = sums[d] * share;
    }
  }
};

// Calls work(item, worker) for every item; a worker that is free takes the next.
template <typename Work>
void share_out(int64_t num_items, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t first, int64_t end) {
    for (int64_t worker = first; worker < end; ++worker)
      for (int64_t item = next++; item < num_items; item = next++) work(item, worker);
  });
}

// Packed keys [blocks, H, D, kBlock] and values [blocks, H, kBlock, padded D] of all users.
std::tuple<at::Tensor, at::Tensor> pack(const at::Tensor& keys, const at::Tensor& values,
                                        const Sizes& sizes, std::vector<User>& users) {
  std::vector<std::tuple<const User*, int64_t>> blocks;
  for (User& user : users) {
    user.first_block = static_cast<int64_t>(blocks.size());
    for (int64_t first = 0; first < user.num_keys; first += kBlock) blocks.emplace_back(&user, first);
  }
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  at::Tensor key_blocks = at::empty({num_blocks, sizes.num_heads, sizes.dim * kBlock}, keys.options());
  at::Tensor value_blocks =
      at::empty({num_blocks, sizes.num_heads, sizes.padded_dim * kBlock}, keys.options());
  float* key_data = key_blocks.data_ptr<float>();
  float* value_data = value_blocks.data_ptr<float>();
  const Rows key_rows(keys), value_rows(values);
  share_out(num_blocks, [&](int64_t block, int64_t) {
    const auto& [user, first] = blocks[block];
    const int64_t count = std::min<int64_t>(kBlock, user->num_keys - first);
    for (int64_t head = 0; head < sizes.num_heads; ++head) {
      const int64_t packed = block * sizes.num_heads + head;
      pack_block(key_rows, value_rows, sizes, head, user->first_key + first, count,
                 key_data + packed * sizes.dim * kBlock,
                 value_data + packed * sizes.padded_dim * kBlock);
    }
  });
  return {key_blocks, value_blocks};
}

// What is read lies within its tensor: nothing behind this looks again.
void check(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
           const std::vector<User>& users) {
  TORCH_CHECK_VALUE(keys.sizes() == values.sizes(), "values are ", values.sizes(),
                    "; the keys are ", keys.sizes());
  TORCH_CHECK_VALUE(keys.sizes().slice(1) == queries.sizes().slice(1), "keys are ", keys.sizes(),
                    "; the queries are ", queries.sizes());
  for (const User& user : users) {
    const int64_t end_row = user.first_row + user.num_rows, end_key = user.first_key + user.num_keys;
    TORCH_CHECK_VALUE(user.num_rows >= 0 && user.first_row >= 0 && end_row <= queries.size(0),
                      "a user's rows are ", user.first_row, " to ", end_row, " of ",
                      queries.size(0));
    TORCH_CHECK_VALUE(user.num_keys >= (user.causal ? user.num_rows : 0) && user.first_key >= 0 &&
                          end_key <= keys.size(0),
                      "a user's keys are ", user.first_key, " to ", end_key, " of ", keys.size(0));
  }
}

template <typename Scoring>
at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                  const Rows& own_keys, const Rows& own_values, int64_t num_tokens,
                  std::vector<User>& users) {
  check(queries, keys, values, users);
  const Sizes sizes(queries);
  const auto [key_blocks, value_blocks] = pack(keys, values, sizes, users);
  at::Tensor out = at::empty(queries.sizes(), queries.options());
  std::vector<Task> tasks;
  for (const User& user : users)
    // A causal user's last rows see most: they go first.
    for (int64_t end = user.num_rows; end > 0; end -= kTaskRows)
      for (int64_t head = 0; head < sizes.num_heads; ++head)
        tasks.push_back({&user, head, std::max<int64_t>(0, end - kTaskRows), end});
  const Attention<Scoring> attention{sizes,
                                     Rows(queries),
                                     own_keys,
                                     own_values,
                                     num_tokens,
                                     key_blocks.const_data_ptr<float>(),
                                     value_blocks.const_data_ptr<float>(),
                                     out.data_ptr<float>()};
  // A worker's scratch starts on a cache line.
  const int64_t scratch_size = (attention.scratch_size() + 15) / 16 * 16;
  at::Tensor scratch = at::empty({at::get_num_threads(), scratch_size}, queries.options());
  float* scratch_data = scratch.data_ptr<float>();
  share_out(static_cast<int64_t>(tasks.size()), [&](int64_t task, int64_t worker) {
    attention.run(tasks[task], scratch_data + worker * scratch_size);
  });
  return out;
}

template <typename Scoring>
at::Tensor shared(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& own_keys, const at::Tensor& own_values,
                  const std::vector<at::Tensor>& biases, const Spans& candidates,
                  const Spans& events) {
  const int64_t num_tokens = queries.size(1);
  TORCH_CHECK_VALUE(own_keys.sizes() == queries.sizes() && own_values.sizes() == queries.sizes(),
                    "own keys and values are ", own_keys.sizes(), " and ", own_values.sizes(),
                    "; the queries are ", queries.sizes());
  TORCH_CHECK_VALUE(events.size() == candidates.size() && biases.size() == candidates.size(),
                    events.size(), " spans of events and ", biases.size(), " biases are for ",
                    candidates.size(), " users");
  std::vector<User> users;
  for (size_t place = 0; place < candidates.size(); ++place) {
    const auto& [first, end] = candidates[place];
    User user({first * num_tokens, end * num_tokens}, events[place]);
    const at::IntArrayRef bias = biases[place].sizes();
    TORCH_CHECK_VALUE(bias.size() == 3 && bias[0] == queries.size(2) && bias[2] == user.num_keys &&
                          (bias[1] == 1 || bias[1] == end - first),
                      "a bias is ", bias, "; its user has ", end - first, " candidates and ",
                      user.num_keys, " events");
    const int64_t missing = user.num_blocks() * kBlock - user.num_keys;
    user.bias = at::constant_pad_nd(biases[place].mul(Scoring::kScale), {0, missing}).contiguous();
    users.push_back(user);
  }
  const Rows own_key_rows(own_keys.flatten(0, 1)), own_value_rows(own_values.flatten(0, 1));
  return attend<Scoring>(queries.flatten(0, 1), keys, values, own_key_rows, own_value_rows,
                         num_tokens, users)
      .view(queries.sizes());
}

template <typename Scoring>
at::Tensor causal(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                  const Spans& query_spans, const Spans& key_spans, int64_t window) {
  TORCH_CHECK_VALUE(query_spans.size() == key_spans.size(), query_spans.size(), " and ",
                    key_spans.size(), " spans do not pair");
  std::vector<User> users;
  for (size_t place = 0; place < query_spans.size(); ++place) {
    users.emplace_back(query_spans[place], key_spans[place]);
    users.back().causal = true;
    users.back().window = window;
  }
  return attend<Scoring>(queries, keys, values, Rows(), Rows(), 1, users);
}

at::Tensor full(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                const Spans& query_spans, const Spans& key_spans) {
  TORCH_CHECK_VALUE(query_spans.size() == key_spans.size(), query_spans.size(), " and ",
                    key_spans.size(), " spans do not pair");
  std::vector<User> users;
  for (size_t place = 0; place < query_spans.size(); ++place)
    users.emplace_back(query_spans[place], key_spans[place]);
  return attend<Softmax>(queries, keys, values, Rows(), Rows(), 1, users);
}

}  // namespace

TORCH_LIBRARY(torchrec_kvshare, library) {
  const std::string rows = "Tensor queries, Tensor keys, Tensor values";
  const std::string shared_arguments =
      "(" + rows + ", Tensor own_keys, Tensor own_values, Tensor[] biases, (int, int)[] candidates, "
      "(int, int)[] events) -> Tensor";
  const std::string spans = rows + ", (int, int)[] query_spans, (int, int)[] key_spans";
  library.def(("shared_attention" + shared_arguments).c_str());
  library.def(("silu_shared_attention" + shared_arguments).c_str());
  library.def(("causal_attention(" + spans + ", int window) -> Tensor").c_str());
  library.def(("silu_causal_attention(" + spans + ", int window) -> Tensor").c_str());
  library.def(("full_attention(" + spans + ") -> Tensor").c_str());
}

TORCH_LIBRARY_IMPL(torchrec_kvshare, CPU, library) {
  library.impl("shared_attention", &shared<Softmax>);
  library.impl("silu_shared_attention", &shared<Silu>);
  library.impl("causal_attention", &causal<Softmax>);
  library.impl("silu_causal_attention", &causal<Silu>);
  library.impl("full_attention", &full);
}
