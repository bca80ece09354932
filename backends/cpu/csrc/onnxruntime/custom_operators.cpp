// ONNX Runtime calls RegisterCustomOps of a library that is registered with a session's options. The operators have the
// names of functions in exported files, which they replace there.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <mutex>
#include <numeric>
#include <vector>

#include "onnxruntime/api.h"
#include "onnxruntime/prune_bytes.h"

namespace nmcompile::onnxruntime {
namespace {

constexpr std::int64_t kBytesOfAPiece = 1 << 16;  // a few microseconds

// A function of exported files. Channels are dim 1, features the last dim.
struct PruneOperator : CustomOperator {
    const char* name_in_files;
    bool channels, wide;
};

struct Kernel {
    Api api;
    const PruneOperator* prune;
    PruneBytes run;
};

// Frees a shape at the end of a scope.
struct OwnedShape {
    const Api& api;
    Shape* shape = nullptr;
    ~OwnedShape() {
        if (shape) api.release(shape);
    }
};

struct Pieces {
    const BytesJob& job;
    PruneBytes run;
    std::int64_t groups, size;

    static void prune(void* data, std::size_t piece) {
        const Pieces& p = *static_cast<const Pieces*>(data);
        const std::int64_t first = static_cast<std::int64_t>(piece) * p.size;
        p.run(p.job, first, std::min(first + p.size, p.groups));
    }
};

Status* run_pieces(const Kernel& kernel, Context* context, const BytesJob& job, std::int64_t groups) {
    Pieces pieces{job, kernel.run, groups, std::max<std::int64_t>(1, kBytesOfAPiece / (kBytesBlock * job.pixels))};
    const std::int64_t count = (groups + pieces.size - 1) / pieces.size;
    if (count > 1) return kernel.api.in_parallel(context, Pieces::prune, static_cast<std::size_t>(count), &pieces);
    if (groups > 0) kernel.run(job, 0, groups);
    return nullptr;
}

std::int64_t product(std::vector<std::int64_t>::const_iterator first, std::vector<std::int64_t>::const_iterator last) {
    return std::accumulate(first, last, std::int64_t{1}, std::multiplies<>());
}

Status* sizes_of(const Api& api, const Value* value, std::vector<std::int64_t>& sizes) {
    OwnedShape owned{api};
    std::size_t rank = 0;
    if (Status* status = api.shape(value, &owned.shape)) return status;
    if (Status* status = api.rank(owned.shape, &rank)) return status;
    sizes.resize(rank);
    return api.sizes(owned.shape, sizes.data(), rank);
}

Status* prune(const Kernel& kernel, Context* context) {
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
    const bool has_pixels = kernel.prune->channels && sizes.size() > 2;
    const std::int64_t pixels = has_pixels ? product(sizes.begin() + 2, sizes.end()) : 1;
    const std::int64_t rows = product(sizes.begin(), sizes.end()) / std::max<std::int64_t>(pixels, 1);
    if (rows % kBytesBlock != 0) {
        return api.status(Code::invalid_argument, "4:8 pruning: the channels of all samples are no multiple of 8");
    }
    return run_pieces(kernel, context, {from, to, pixels, kernel.prune->wide}, pixels ? rows / kBytesBlock : 0);
}

Status* create(CustomOperator::Self self, const Function* table, const void*, void** kernel) {
    *kernel = new Kernel{Api(table), static_cast<const PruneOperator*>(self), prune_bytes(instruction_sets().front())};
    return nullptr;
}

std::size_t in_place(int** inputs, int** outputs) {
    *inputs = new int[1]{0};
    *outputs = new int[1]{0};
    return 1;
}

PruneOperator prune_operator(const char* name, bool channels, bool wide) {
    PruneOperator result{};
    result.name_in_files = name;
    result.channels = channels;
    result.wide = wide;
    result.version = kApiVersion;
    result.name = [](CustomOperator::Self self) { return static_cast<const PruneOperator*>(self)->name_in_files; };
    result.provider = [](CustomOperator::Self) -> const char* { return nullptr; };
    result.input_type = result.output_type = [](CustomOperator::Self, std::size_t) { return kUint8; };
    result.input_count = result.output_count = [](CustomOperator::Self) { return std::size_t{1}; };
    result.input_kind = result.output_kind = result.input_memory = [](CustomOperator::Self, std::size_t) { return 0; };
    result.least_inputs = result.same_inputs = result.least_outputs = result.same_outputs = result.first_version =
        [](CustomOperator::Self) { return 1; };
    result.last_version = [](CustomOperator::Self) { return 1000; };
    result.create_checked = create;
    result.compute = [](void* kernel, Context* context) { return prune(*static_cast<Kernel*>(kernel), context); };
    result.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    result.in_place = in_place;
    result.release_in_place = [](int* inputs, int* outputs) {
        delete[] inputs;
        delete[] outputs;
    };
    return result;
}

const PruneOperator kOperators[] = {
    prune_operator("PruneIntegers_4_8_Channels", true, false),
    prune_operator("PruneIntegers_4_8_Features", false, false),
    prune_operator("PruneLargeIntegers_4_8_Channels", true, true),
    prune_operator("PruneLargeIntegers_4_8_Features", false, true),
};

// Sessions refer to the domain for as long as they live, so it stays until the process ends.
Status* make_domain(const Api& api, Domain** domain) {
    static std::mutex mutex;
    static Domain* made = nullptr;
    const std::lock_guard lock(mutex);
    if (!made) {
        if (Status* status = api.create_domain("nmcompile", &made)) return status;
        for (const PruneOperator& one : kOperators) {
            if (Status* status = api.add_operator(made, static_cast<const CustomOperator*>(&one))) return status;
        }
    }
    *domain = made;
    return nullptr;
}

}  // namespace

Status* register_operators(SessionOptions* options, const ApiBase* base) {
    const Api api(base->api(kApiVersion));
    if (!api) return Api(base->api(1)).status(Code::fail, "nmcompile's operators need ONNX Runtime 1.18 or newer");
    Domain* domain = nullptr;
    if (Status* status = make_domain(api, &domain)) return status;
    return api.add_domain(options, domain);
}

}  // namespace nmcompile::onnxruntime

extern "C" [[gnu::visibility("default")]] nmcompile::onnxruntime::Status* RegisterCustomOps(
    nmcompile::onnxruntime::SessionOptions* options, const nmcompile::onnxruntime::ApiBase* base) {
    return nmcompile::onnxruntime::register_operators(options, base);
}
