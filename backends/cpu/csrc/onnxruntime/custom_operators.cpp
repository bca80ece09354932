// ONNX Runtime calls RegisterCustomOps of a library that is registered with a session's options. The operators have the
// names of functions in exported files, which they replace there.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "machine/parallel.h"
#include "onnxruntime/api.h"
#include "onnxruntime/prune_bytes.h"

namespace nmcompile::onnxruntime {
namespace {

constexpr std::int64_t kBlocksOfAPiece = 1 << 13;  // a few microseconds

// A function of exported files that prunes bytes 4:8 along the last dim.
struct PruneOperator : CustomOperator {
    const char* name_in_files;
    bool wide;
};

struct Kernel {
    Api api;
    PruneBytes prune;
    bool wide;
};

// A shape that is freed at the end of a scope.
struct OwnedShape {
    const Api& api;
    Shape* shape = nullptr;
    ~OwnedShape() {
        if (shape) api.release(shape);
    }
};

Status* sizes_of(const Api& api, const Value* value, std::vector<std::int64_t>& sizes) {
    OwnedShape owned{api};
    std::size_t rank = 0;
    if (Status* status = api.shape(value, &owned.shape)) return status;
    if (Status* status = api.rank(owned.shape, &rank)) return status;
    sizes.resize(rank);
    return api.sizes(owned.shape, sizes.data(), rank);
}

struct Job {
    const Kernel& kernel;
    const std::uint8_t* x;
    std::uint8_t* pruned;
    std::int64_t blocks;

    static void piece(void* job, std::size_t number) {
        const auto& [kernel, x, pruned, blocks] = *static_cast<const Job*>(job);
        const std::int64_t first = static_cast<std::int64_t>(number) * kBlocksOfAPiece, at = first * kBytesBlock;
        kernel.prune(x + at, pruned + at, std::min(kBlocksOfAPiece, blocks - first), kernel.wide);
    }
};

Status* run(Job job, Context* context) {
    const std::int64_t count = pieces(job.blocks, kBlocksOfAPiece);
    if (count > 1) return job.kernel.api.in_parallel(context, Job::piece, static_cast<std::size_t>(count), &job);
    if (count == 1) Job::piece(&job, 0);
    return nullptr;
}

Status* compute(const Kernel& kernel, Context* context) {
    const Api& api = kernel.api;
    const Value* x = nullptr;
    Value* pruned = nullptr;
    std::vector<std::int64_t> sizes;
    std::uint8_t *from = nullptr, *to = nullptr;
    if (Status* status = api.input(context, 0, &x)) return status;
    if (Status* status = sizes_of(api, x, sizes)) return status;
    if (Status* status = api.output(context, 0, sizes.data(), sizes.size(), &pruned)) return status;
    if (Status* status = api.data(x, &from)) return status;
    if (Status* status = api.data(pruned, &to)) return status;
    std::int64_t count = 1;
    for (const std::int64_t size : sizes) count *= size;
    if (count % kBytesBlock != 0) {
        return api.status(Code::invalid_argument, "4:8 pruning: the number of elements is not a multiple of 8");
    }
    return run({kernel, from, to, count / kBytesBlock}, context);
}

Status* create(CustomOperator::Self self, const Function* table, const void*, void** kernel) {
    const bool wide = static_cast<const PruneOperator*>(self)->wide;
    *kernel = new Kernel{Api(table), prune_bytes_kernel(instruction_sets().front()), wide};
    return nullptr;
}

std::size_t in_place(int** inputs, int** outputs) {
    *inputs = new int[1]{0};
    *outputs = new int[1]{0};
    return 1;
}

void release_in_place(int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
}

PruneOperator prune_operator(const char* name, bool wide) {
    PruneOperator result{};
    result.name_in_files = name;
    result.wide = wide;
    result.version = kApiVersion;
    result.name = [](CustomOperator::Self self) { return static_cast<const PruneOperator*>(self)->name_in_files; };
    result.provider = [](CustomOperator::Self) -> const char* { return nullptr; };
    result.input_type = result.output_type = [](CustomOperator::Self, std::size_t) { return kUint8; };
    result.input_count = result.output_count = [](CustomOperator::Self) { return std::size_t{1}; };
    result.input_kind = result.output_kind = result.input_memory = [](CustomOperator::Self, std::size_t) { return 0; };
    result.least_inputs = result.same_inputs = result.least_outputs = result.same_outputs = result.first_version =
        [](CustomOperator::Self) { return 1; };
    result.last_version = [](CustomOperator::Self) { return kLastVersion; };
    result.create_checked = create;
    result.compute = [](void* kernel, Context* context) { return compute(*static_cast<Kernel*>(kernel), context); };
    result.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    result.in_place = in_place;
    result.release_in_place = release_in_place;
    return result;
}

const PruneOperator kOperators[] = {
    prune_operator("PruneIntegers_4_8_Features", false),
    prune_operator("PruneLargeIntegers_4_8_Features", true),
};

Status* make_domain(const Api& api, Domain** domain) {
    if (Status* status = api.create_domain("nmcompile", domain)) return status;
    for (const PruneOperator& one : kOperators) {
        if (Status* status = api.add_operator(*domain, static_cast<const CustomOperator*>(&one))) return status;
    }
    return nullptr;
}

// Returns the one domain of all sessions. They may refer to it for as long as the process lives.
Status* shared_domain(const Api& api, Domain** domain) {
    static std::mutex mutex;
    static Domain* made = nullptr;
    const std::lock_guard lock(mutex);
    if (!made) {
        Domain* fresh = nullptr;
        if (Status* status = make_domain(api, &fresh)) return status;
        made = fresh;
    }
    *domain = made;
    return nullptr;
}

}  // namespace

Status* register_operators(SessionOptions* options, const ApiBase* base) {
    const Api api(base->api(kApiVersion));
    if (!api) return Api(base->api(1)).status(Code::fail, "nmcompile's operators need ONNX Runtime 1.18 or newer");
    Domain* domain = nullptr;
    if (Status* status = shared_domain(api, &domain)) return status;
    return api.add_domain(options, domain);
}

}  // namespace nmcompile::onnxruntime

#if defined(_WIN32)
#define NMCOMPILE_EXPORT __declspec(dllexport)
#else
#define NMCOMPILE_EXPORT __attribute__((visibility("default")))
#endif

extern "C" NMCOMPILE_EXPORT nmcompile::onnxruntime::Status* RegisterCustomOps(
    nmcompile::onnxruntime::SessionOptions* options, const nmcompile::onnxruntime::ApiBase* base) {
    return nmcompile::onnxruntime::register_operators(options, base);
}
