// Answers a file of requests: one JSON object per line in, one per line out, in order.

#include "host.h"

#include <getopt.h>

#include <charconv>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

namespace {

namespace fs = std::filesystem;
using OrderedJson = nlohmann::ordered_json;

constexpr int kFailed = 1;
constexpr int kMisused = 2;
constexpr int kRefused = 3;  // some lines got an error in place of scores

constexpr char kUsage[] =
    "usage: kvshare_host ARTIFACT REQUESTS.jsonl ANSWERS.jsonl\n"
    "    [--cache memory|off]   where K/V is kept between requests (memory)\n"
    "    [--capacity-bytes N]   of K/V (268435456)\n"
    "    [--ttl-s S]            seconds of requests' time after which K/V is encoded anew (300)\n"
    "    [--threads K]          of torch, for one request (as many as there are cores)\n"
    "    [--times TIMES.json]   gets each line's milliseconds in the model; null: refused\n";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  fs::path artifact, requests, answers, times;
  bool is_cached = true;
  CacheLimits limits;
  int num_threads = 0;  // 0: torch's choice
};

template <typename Number>
Number parse_number(const std::string& option, const std::string& text, Number least) {
  Number number{};
  const char* const end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stopped != end || !(number >= least)) {
    throw UsageError(option + " is " + text + "; a number from " + Json(least).dump() + " on");
  }
  return number;
}

bool parse_cache(const std::string& name) {
  if (name != "memory" && name != "off") {
    throw UsageError("--cache is " + name + "; memory and off are allowed");
  }
  return name == "memory";
}

Arguments parse_arguments(int argc, char** argv) {
  const option options[] = {{"cache", required_argument, nullptr, 'c'},
                            {"capacity-bytes", required_argument, nullptr, 'b'},
                            {"ttl-s", required_argument, nullptr, 's'},
                            {"threads", required_argument, nullptr, 'k'},
                            {"times", required_argument, nullptr, 't'},
                            {nullptr, 0, nullptr, 0}};
  Arguments found;
  opterr = 0;
  for (int given; (given = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
    if (given == 'c') found.is_cached = parse_cache(optarg);
    if (given == 'b') found.limits.capacity_bytes = parse_number("--capacity-bytes", optarg, 1L);
    if (given == 's') found.limits.ttl_s = parse_number("--ttl-s", optarg, 0.0);
    if (given == 'k') found.num_threads = parse_number("--threads", optarg, 1);
    if (given == 't') found.times = optarg;
    if (given == '?') throw UsageError(std::string("cannot read ") + argv[optind - 1]);
  }
  if (argc - optind != 3) throw UsageError("three paths are needed");
  found.artifact = argv[optind];
  found.requests = argv[optind + 1];
  found.answers = argv[optind + 2];
  return found;
}

// A file that appears under its name once it is complete.
class WholeFile {
 public:
  explicit WholeFile(const fs::path& path)
      : path_(path), beside_(path.parent_path() / ("." + path.filename().string() + ".new")) {
    stream_.open(beside_, std::ios::binary);
    check();
  }
  WholeFile(const WholeFile&) = delete;
  WholeFile& operator=(const WholeFile&) = delete;
  ~WholeFile() {
    std::error_code ignored;  // After publish there is no file to remove.
    fs::remove(beside_, ignored);
  }

  std::ostream& stream() { return stream_; }

  void publish() {
    stream_.close();
    check();
    fs::rename(beside_, path_);
  }

 private:
  fs::path path_, beside_;
  std::ofstream stream_;

  void check() {
    if (!stream_) throw std::runtime_error(path_.string() + " cannot be written");
  }
};

// A list for an unnamed task, else an object by task.
OrderedJson json_of(const Scores& scores) {
  if (scores.size() == 1 && scores[0].first.empty()) return scores[0].second;
  OrderedJson by_task = OrderedJson::object();
  for (const auto& [task, of_task] : scores) by_task[task] = of_task;
  return by_task;
}

// The project's one answer format.
std::string answer_line(const Request& request, const Scored& scored, const std::string& version) {
  const CacheUse& cache = scored.cache;
  OrderedJson rest = {{"scores", json_of(scored.scores)},
                            {"model_version", version},
                            {"cache",
                             {{"status", cache.status},
                              {"reason", cache.reason},
                              {"cached_events", cache.cached_events},
                              {"computed_events", cache.computed_events},
                              {"tier", cache.cached_events > 0 ? "pages" : "none"}}}};
  if (request.reports_unknown_ids) {
    OrderedJson& unknown = rest["unknown_ids"] = OrderedJson::object();
    for (const auto& [column, ids] : request.ids) {
      if (ids.unknown > 0) unknown[column] = ids.unknown;
    }
  }
  return "{\"request_id\":" + request.request_id + "," + rest.dump().substr(1);
}

// A refusal in the project's error format.
std::string refusal_line(const std::string& request_id, const std::string& type,
                         const std::string& message) {
  return "{\"request_id\":" + request_id + ",\"error\":{\"type\":\"" + type +
         "\",\"message\":" + json_string(message) + "}}";
}

bool is_blank(const std::string& line) {
  return line.find_first_not_of(" \t\n\r\v\f") == std::string::npos;
}

struct Counts {
  int64_t scored = 0, refused = 0;
  std::map<std::string, int64_t> by_status;
  std::map<std::string, IdCount> ids;  // of scored lines, by column

  void add_ids(const Request& request) {
    for (const auto& [column, count] : request.ids) {
      ids[column].given += count.given;
      ids[column].unknown += count.unknown;
    }
  }

  // Columns with unknown ids, and their number and share.
  std::string unknown_text() const {
    std::string text;
    for (const auto& [column, count] : ids) {
      if (count.unknown == 0) continue;
      char share[16];
      const double percent = 100.0 * static_cast<double>(count.unknown) / count.given;
      std::snprintf(share, sizeof share, " (%.1f %%)", percent);
      text += (text.empty() ? "" : ", ") + column + " " + std::to_string(count.unknown) + " of " +
              std::to_string(count.given) + share;
    }
    return text.empty() ? "none" : text;
  }
};

// Skips blank lines. A refused line has null in place of its time.
Counts answer_lines(Host& host, std::istream& lines, std::ostream& answers, Json& times) {
  Counts counts;
  for (std::string line; std::getline(lines, line);) {
    if (is_blank(line)) continue;
    std::string request_id = "null";
    const auto refuse = [&](const std::string& type, const std::string& message) {
      answers << refusal_line(request_id, type, message) << "\n";
      times.push_back(nullptr);
      ++counts.refused;
    };
    try {
      const Json raw = decode_request(line);
      request_id = request_id_of(raw);
      const Request request = parse_request(raw, host.schema());
      const Scored scored = host.rank(request);
      answers << answer_line(request, scored, host.model_version()) << "\n";
      times.push_back(scored.model_ms);
      ++counts.scored;
      ++counts.by_status[scored.cache.status];
      counts.add_ids(request);
    } catch (const RequestError& error) {
      refuse("RequestError", error.what());
    } catch (const ScoreError& error) {
      refuse("ScoreError", error.what());
    }
  }
  return counts;
}

Counts answer_file(const Arguments& given) {
  std::ifstream requests(given.requests, std::ios::binary);
  if (!requests || fs::is_directory(given.requests)) {
    throw std::runtime_error(given.requests.string() + " is no file that can be read");
  }
  const auto limits = given.is_cached ? std::optional(given.limits) : std::nullopt;
  Host host(given.artifact, limits);
  WholeFile answers(given.answers);
  Json times = Json::array();
  const Counts counts = answer_lines(host, requests, answers.stream(), times);
  if (requests.bad()) {
    throw std::runtime_error(given.requests.string() + " cannot be read to its end");
  }
  if (!given.times.empty()) {
    WholeFile file(given.times);
    file.stream() << times << "\n";
    file.publish();
  }
  answers.publish();
  return counts;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments given = parse_arguments(argc, argv);
    if (given.num_threads > 0) set_num_threads(given.num_threads);
    const Counts counts = answer_file(given);
    std::cout << "scored " << counts.scored << ", refused " << counts.refused
              << "; cache: " << Json(counts.by_status) << "\n"
              << "unknown ids: " << counts.unknown_text() << "\n"
              << "wrote " << given.answers.string() << "\n";
    return counts.refused ? kRefused : 0;
  } catch (const UsageError& error) {
    std::cerr << "kvshare_host: " << error.what() << "\n" << kUsage;
    return kMisused;
  } catch (const std::exception& error) {
    std::cerr << "kvshare_host: " << error.what() << "\n";
    return kFailed;
  }
}
