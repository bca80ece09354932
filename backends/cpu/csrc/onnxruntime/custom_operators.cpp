// ONNX Runtime calls RegisterCustomOps of a library that is registered with a session's options. The operators have the
// names of functions in exported files, which they replace there.

#include <cstdint>
#include <mutex>
#include <vector>

#include "onnxruntime/api.h"
#include "onnxruntime/operators.h"

namespace nmcompile::onnxruntime {
namespace {

struct Kernel {
    Api api;
    const BytesOperator* operation;
    InstructionSet isa;
};

Status* sizes_of(const Api& api, const Value* value, std::vector<std::int64_t>& sizes) {
    OwnedShape owned{api};
    std::size_t rank = 0;
    if (Status* status = api.shape(value, &owned.shape)) return status;
    if (Status* status = api.rank(owned.shape, &rank)) return status;
    sizes.resize(rank);
    return api.sizes(owned.shape, sizes.data(), rank);
}

Status* compute(const Kernel& kernel, Context* context) {
    const Api& api = kernel.api;
    const Value* x = nullptr;
    Value* result = nullptr;
    std::vector<std::int64_t> sizes;
    void *from = nullptr, *to = nullptr;
    if (Status* status = api.input(context, 0, &x)) return status;
    if (Status* status = sizes_of(api, x, sizes)) return status;
    if (Status* status = api.output(context, 0, sizes.data(), sizes.size(), &result)) return status;
    if (Status* status = api.data(x, &from)) return status;
    if (Status* status = api.data(result, &to)) return status;
    std::int64_t count = 1;
    for (const std::int64_t size : sizes) count *= size;
    const Bytes bytes{static_cast<const std::uint8_t*>(from), static_cast<std::uint8_t*>(to), count};
    return kernel.operation->run(api, context, bytes, kernel.isa);
}

Status* create(CustomOperator::Self self, const Function* table, const void*, void** kernel) {
    *kernel = new Kernel{Api(table), static_cast<const BytesOperator*>(self), instruction_sets().front()};
    return nullptr;
}

// Scales and steps are inputs 1 and 3 of the operator that has them.
int input_type(CustomOperator::Self, std::size_t index) { return index == 1 || index == 3 ? kFloat : kUint8; }

std::size_t in_place(int** inputs, int** outputs) {
    *inputs = new int[1]{0};
    *outputs = new int[1]{0};
    return 1;
}

void release_in_place(int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
}

BytesOperator make(const char* name, std::size_t inputs, decltype(BytesOperator::run) run) {
    BytesOperator result{};
    result.name_in_files = name;
    result.inputs = inputs;
    result.run = run;
    result.version = kApiVersion;
    result.name = [](CustomOperator::Self self) { return static_cast<const BytesOperator*>(self)->name_in_files; };
    result.provider = [](CustomOperator::Self) -> const char* { return nullptr; };
    result.input_type = input_type;
    result.input_count = [](CustomOperator::Self self) { return static_cast<const BytesOperator*>(self)->inputs; };
    result.output_type = [](CustomOperator::Self, std::size_t) { return kUint8; };
    result.output_count = [](CustomOperator::Self) { return std::size_t{1}; };
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

const BytesOperator kOperators[] = {
    make("PruneIntegers_4_8_Features", 1, prune),
    make("PruneLargeIntegers_4_8_Features", 1, prune_wide),
    make("RoundIntegers", 7, round_steps),
};

Status* make_domain(const Api& api, Domain** domain) {
    if (Status* status = api.create_domain("nmcompile", domain)) return status;
    for (const BytesOperator& one : kOperators) {
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
