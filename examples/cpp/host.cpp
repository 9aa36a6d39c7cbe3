#include "host.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/tensor.h>
#include <dlfcn.h>
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/version.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

namespace {

namespace fs = std::filesystem;
using Features = c10::Dict<std::string, at::Tensor>;

// Jagged operators, then those of quantised tables. Each library loads its dependencies from its
// own folder, so the order does not matter.
const char* const kOperators[] = {
    FBGEMM_FOLDER "/fbgemm_gpu_py.so",
    FBGEMM_FOLDER "/fbgemm_gpu_tbe_common.so",
    FBGEMM_FOLDER "/fbgemm_gpu_tbe_cache.so",
    FBGEMM_FOLDER "/fbgemm_gpu_tbe_inference.so",
};
// Between scores here and those of the exporter, perhaps on another processor.
constexpr double kGoldenTolerance = 2e-5;
// TorchScript profiles the first call and compiles in the second, which takes seconds.
constexpr int kWarmUpRounds = 3;

void load_operators(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw ArtifactError("operators cannot be loaded: " + std::string(dlerror()));
  }
}

// Otherwise TorchScript compiles a program again for the first shapes of its inputs, which takes
// seconds and makes no call on a CPU faster.
void compile_for_any_shape() {
  torch::jit::FusionStrategy strategy = {{torch::jit::FusionBehavior::DYNAMIC, 0}};
  torch::jit::setFusionStrategy(strategy);
}

// The package has a library of its attention operators for each CPU capability and one torch.
std::string attention_library() {
  std::string capability = at::get_cpu_capability();
  std::transform(capability.begin(), capability.end(), capability.begin(),
                 [](unsigned char letter) { return std::tolower(letter); });
  return KVSHARE_FOLDER "/attention/_native_" + capability + "-torch" TORCH_VERSION ".so";
}

// Torch's message without the stack traces of C++ and Python: an exception raised in the program is
// in the last line, one of torch's own in the first.
std::string reason_of(const std::exception& error) {
  std::istringstream lines(error.what());
  std::string line, reason;
  const bool is_raised = dynamic_cast<const torch::jit::JITException*>(&error) != nullptr;
  while ((is_raised || reason.empty()) && std::getline(lines, line)) {
    if (!line.empty()) reason = line;
  }
  return reason;
}

// Puts the file's name into the error of whatever uses a file of the artifact.
template <typename Use>
auto with_file(const fs::path& path, Use use) {
  try {
    return use();
  } catch (const std::exception& error) {
    throw ArtifactError(path.string() + ": " + reason_of(error));
  }
}

Json read_json_file(const fs::path& path) {
  return with_file(path, [&] {
    std::ifstream file(path, std::ios::binary);
    // A folder opens without an error, too.
    if (!file || !fs::is_regular_file(path)) throw ArtifactError("there is no such file to read");
    return read_json({std::istreambuf_iterator<char>(file), {}});
  });
}

// The numbers of a NumPy file: two rows of 64-bit integers, one after the other.
std::vector<int64_t> read_ids_file(const fs::path& path) {
  return with_file(path, [&] {
    std::ifstream file(path, std::ios::binary);
    if (!file || !fs::is_regular_file(path)) throw ArtifactError("there is no such file to read");
    unsigned char start[10] = {};  // "\x93NUMPY", version 1.0, length of the header
    file.read(reinterpret_cast<char*>(start), sizeof start);
    std::string header(start[8] + 256 * start[9], ' ');
    file.read(header.data(), static_cast<std::streamsize>(header.size()));
    const bool is_right = file && std::string(start, start + 8) == std::string("\x93NUMPY\1\0", 8) &&
                          header.find("'descr': '<i8'") != std::string::npos &&
                          header.find("'fortran_order': False") != std::string::npos &&
                          header.find("'shape': (2, ") != std::string::npos;
    const std::size_t num_bytes = fs::file_size(path) - sizeof start - header.size();
    if (!is_right || num_bytes % (2 * sizeof(int64_t))) {
      throw ArtifactError("it does not hold two rows of 64-bit integers");
    }
    std::vector<int64_t> numbers(num_bytes / sizeof(int64_t));
    file.read(reinterpret_cast<char*>(numbers.data()), static_cast<std::streamsize>(num_bytes));
    if (!file) throw ArtifactError("it cannot be read to its end");
    return numbers;
  });
}

// The model version as answers have it.
std::string version_of(const Json& manifest) {
  const auto start_of = [&](const char* digest) {
    return manifest.at(digest).get<std::string>().substr(0, 16);
  };
  return start_of("model_digest") + "-" + start_of("tables_digest");
}

Features features_of(const Request& request, const Schema& schema) {
  Features features;
  for (const auto& [name, column] : request.columns) features.insert(name, at::tensor(column));
  for (const auto& [name, column] : request.floats) features.insert(name, at::tensor(column));
  const at::Tensor dense = at::tensor(request.dense);
  features.insert("candidates.dense", dense.view({request.num_candidates, schema.num_dense()}));
  return features;
}

// Splits probabilities [C, tasks].
Scores scores_of(const at::Tensor& probabilities, const std::vector<std::string>& tasks) {
  const at::Tensor by_task = probabilities.t().contiguous();
  const double* next = by_task.const_data_ptr<double>();
  const int64_t num_candidates = by_task.numel() / static_cast<int64_t>(tasks.size());
  Scores scores;
  for (const std::string& task : tasks) {
    scores.emplace_back(task, std::vector<double>(next, next + num_candidates));
    next += num_candidates;
  }
  return scores;
}

// A request's id as Python shows it in a message.
std::string shown_id(const std::string& request_id) {
  if (request_id == "null") return "None";
  return request_id[0] == '"' ? Json::parse(request_id).get<std::string>() : request_id;
}

// A program refuses scores that are not finite itself; the host relies on no program for that.
void check_scores(const Scores& scores, const Request& request) {
  for (const auto& [task, of_task] : scores) {
    for (std::size_t candidate = 0; candidate < of_task.size(); ++candidate) {
      if (std::isfinite(of_task[candidate])) continue;
      throw ScoreError("the model gave no finite score for candidate " + std::to_string(candidate) +
                       " of request " + shown_id(request.request_id));
    }
  }
}

std::vector<std::string> names_of(const c10::IValue& names) {
  std::vector<std::string> found;
  for (const c10::IValue& name : names.toListRef()) found.push_back(name.toStringRef());
  return found;
}

// How a task's scores differ from the golden ones; empty if they are equal within the tolerance.
std::string difference(const std::vector<double>& scores, const std::vector<double>& golden) {
  if (scores.size() != golden.size()) {
    return std::to_string(scores.size()) + " scores, not " + std::to_string(golden.size());
  }
  for (std::size_t candidate = 0; candidate < scores.size(); ++candidate) {
    if (!(std::abs(scores[candidate] - golden[candidate]) <= kGoldenTolerance)) {
      return "candidate " + std::to_string(candidate) + " has the score " +
             std::to_string(scores[candidate]) + ", not " + std::to_string(golden[candidate]);
    }
  }
  return "";
}

// Likewise of all tasks; golden scores are as in an answer.
std::string difference(const Scores& scores, const Json& golden) {
  for (const auto& [task, of_task] : scores) {
    const Json& expected = task.empty() ? golden : golden.at(task);
    const std::string differs = difference(of_task, expected.get<std::vector<double>>());
    if (!differs.empty()) return differs + (task.empty() ? "" : " for task " + task);
  }
  return "";
}

}  // namespace

// The program, the names of its tasks, and those of the statuses and reasons that its cache answers
// as numbers.
struct Host::Program {
  torch::jit::Module module;
  std::vector<std::string> tasks, statuses, reasons;

  Program(const fs::path& path, const std::string& version)
      : module(torch::jit::load(path.string())) {
    module.eval();
    const std::string own_version = module.attr("model_version").toStringRef();
    if (own_version != version) {
      throw ArtifactError("it is of model " + own_version + "; the manifest is of " + version);
    }
    tasks = names_of(module.run_method("task_names"));
    statuses = names_of(module.run_method("status_names"));
    reasons = names_of(module.run_method("reason_names"));
  }

  void configure(const CacheLimits& limits) {
    module.run_method("configure", limits.capacity_bytes, limits.ttl_s);
  }

  void forget(const Request& request) {
    module.run_method("forget", request.columns.at("user_key").front());
  }

  // An exception of the program is an error of this request: the inputs passed their checks.
  Scored rank(const Features& features, const Request& request, bool is_cached) {
    try {
      return is_cached ? rank_cached(features) : rank_uncached(features, request);
    } catch (const torch::jit::JITException& error) {
      const std::string message = error.getOriginalMsg().value_or(reason_of(error));
      throw ScoreError(message + " of request " + shown_id(request.request_id));
    }
  }

 private:
  Scored rank_cached(const Features& features) {
    const auto answer = module.run_method("rank", features).toTuple();
    const at::Tensor use = answer->elements()[1].toTensor().contiguous();
    const int64_t* row = use.const_data_ptr<int64_t>();
    return {scores_of(answer->elements()[0].toTensor(), tasks),
            {statuses.at(row[0]), reasons.at(row[1]), row[2], row[3]}};
  }

  Scored rank_uncached(const Features& features, const Request& request) {
    return {scores_of(module.forward({features}).toTensor(), tasks),
            {"bypass", "cache_off", 0, request.num_events}};
  }
};

Host::Host(const fs::path& artifact, const std::optional<CacheLimits>& limits)
    : is_cached_(limits.has_value()) {
  const c10::InferenceMode no_gradients;
  compile_for_any_shape();
  for (const char* library : kOperators) load_operators(library);
  load_operators(attention_library());
  const Json manifest = read_json_file(artifact / "manifest.json");
  const Json golden = read_json_file(artifact / "golden.json");
  const Json schema = read_json_file(artifact / "schema.json");
  const std::vector<int64_t> ids = read_ids_file(artifact / "ids.npy");
  with_file(artifact / "schema.json", [&] { schema_ = Schema::from_json(schema, ids); });
  with_file(artifact / "manifest.json", [&] { model_version_ = version_of(manifest); });
  with_file(artifact / "model.pt", [&] {
    program_ = std::make_unique<Program>(artifact / "model.pt", model_version_);
    if (is_cached_) program_->configure(*limits);
  });
  with_file(artifact / "golden.json", [&] { check_golden(golden); });
}

Host::~Host() = default;

Scored Host::rank(const Request& request) {
  const c10::InferenceMode no_gradients;
  const Features features = features_of(request, schema_);
  const auto start = std::chrono::steady_clock::now();
  Scored scored = program_->rank(features, request, is_cached_);
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
  scored.model_ms = taken.count();
  check_scores(scored.scores, request);
  return scored;
}

void Host::check_golden(const Json& golden) {
  for (const Json& one : golden) {
    const Request request = parse_request(one.at("request"), schema_);
    const Json& expected = one.at("scores");
    for (int round = 0; round < kWarmUpRounds; ++round) {
      const std::string differs = difference(rank(request).scores, expected);
      if (!differs.empty()) throw ArtifactError("the program does not agree: " + differs);
    }
    // No client's request may find the K/V of a golden request.
    if (is_cached_) program_->forget(request);
  }
}

void set_num_threads(int num_threads) { at::set_num_threads(num_threads); }
