// The part of ONNX Runtime's C API that a custom operator needs, by position in its table of functions: no wheel holds
// the headers. Versions of the API only append to the table, so a position means the same in all of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nmcompile::onnxruntime {

// Of ONNX Runtime 1.18, the first that reads the opset of exported files.
constexpr std::uint32_t kApiVersion = 18;

struct Status;  // null for success
struct SessionOptions;
struct Domain;
struct Context;
struct Value;
struct Shape;
struct ShapeContext;

enum class Code { fail = 1, invalid_argument = 2 };
constexpr int kFloat = 1, kUint8 = 2;  // among the types of elements
constexpr int kLastVersion = 0x7FFFFFFF;  // of an operator that no later one replaces

using Function = void (*)();

struct ApiBase {
    const Function* (*api)(std::uint32_t version);  // null for a version that this ONNX Runtime does not have
    const char* (*version)();
};

class Api {
public:
    explicit Api(const Function* table = nullptr) : table_(table) {}
    explicit operator bool() const { return table_ != nullptr; }

    Status* status(Code code, const char* message) const { return call<Status*>(0, code, message); }
    Status* create_domain(const char* name, Domain** domain) const { return call<Status*>(26, name, domain); }
    Status* add_operator(Domain* domain, const void* custom) const { return call<Status*>(27, domain, custom); }
    Status* add_domain(SessionOptions* options, Domain* domain) const { return call<Status*>(28, options, domain); }
    Status* data(const Value* value, void** data) const { return call<Status*>(51, value, data); }
    Status* rank(const Shape* shape, std::size_t* rank) const { return call<Status*>(61, shape, rank); }
    Status* sizes(const Shape* shape, std::int64_t* sizes, std::size_t rank) const {
        return call<Status*>(62, shape, sizes, rank);
    }
    Status* count(const Shape* shape, std::size_t* count) const { return call<Status*>(64, shape, count); }
    Status* shape(const Value* value, Shape** shape) const { return call<Status*>(65, value, shape); }
    Status* input(const Context* context, std::size_t index, const Value** value) const {
        return call<Status*>(90, context, index, value);
    }
    Status* output(Context* context, std::size_t index, const std::int64_t* sizes, std::size_t rank,
                   Value** value) const {
        return call<Status*>(91, context, index, sizes, rank, value);
    }
    void release(Shape* shape) const { call<void>(99, shape); }
    // Calls `work(data, i)` for all i below `count` on the session's threads.
    Status* in_parallel(const Context* context, void (*work)(void*, std::size_t), std::size_t count,
                        void* data) const {
        return call<Status*>(274, context, work, count, std::size_t{0}, data);
    }

private:
    template <class Result, class... Arguments>
    Result call(int position, Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(table_[position])(arguments...);
    }

    const Function* table_;
};

// The callbacks of an operator, in the order of the API.
struct CustomOperator {
    using Self = const CustomOperator*;

    std::uint32_t version;
    void* (*create)(Self, const Function* table, const void* info);
    const char* (*name)(Self);
    const char* (*provider)(Self);  // null for the CPU's
    int (*input_type)(Self, std::size_t index);
    std::size_t (*input_count)(Self);
    int (*output_type)(Self, std::size_t index);
    std::size_t (*output_count)(Self);
    void (*compute_unchecked)(void* kernel, Context*);
    void (*destroy)(void* kernel);
    int (*input_kind)(Self, std::size_t index);  // 0 for one that is required
    int (*output_kind)(Self, std::size_t index);
    int (*input_memory)(Self, std::size_t index);  // 0 for the provider's
    int (*least_inputs)(Self);
    int (*same_inputs)(Self);
    int (*least_outputs)(Self);
    int (*same_outputs)(Self);
    Status* (*create_checked)(Self, const Function* table, const void* info, void** kernel);
    Status* (*compute)(void* kernel, Context*);
    Status* (*infer_shapes)(Self, ShapeContext*);
    int (*first_version)(Self);
    int (*last_version)(Self);
    std::size_t (*in_place)(int** inputs, int** outputs);  // pairs that may be the same memory
    void (*release_in_place)(int* inputs, int* outputs);
    std::size_t (*aliases)(int** inputs, int** outputs);
    void (*release_aliases)(int* inputs, int* outputs);
};

}  // namespace nmcompile::onnxruntime
