#include "abi/python_calls.h"

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "abi/python_tensor.h"

namespace {

// PyMethodDef, and METH_FASTCALL: arguments are an array of objects.
struct Method {
    const char* name;
    void* (*call)(void* self, void* const* arguments, intptr_t count);
    int flags = 0x80;
    const char* doc = nullptr;
};

// Of the process: a library is loaded into one interpreter.
qkv::Interpreter python;

// The status as an object; or null for arguments that are no numbers, or another number of them: an exception is set.
template <class Call>
void* answer(bool are_all, Call call) {
    if (!are_all) return python.refuse_arguments(), nullptr;
    const int status = call();
    return python.exception() ? nullptr : python.integer(status);
}

template <class T>
T value_of(void* object) {
    if constexpr (std::is_pointer_v<T>)
        return object;
    else if constexpr (std::is_floating_point_v<T>)
        return (T)python.as_real(object);
    else
        return (T)python.as_integer(object);
}

// A function of tensors and numbers, each of which is an argument.
template <auto FUNCTION>
struct Arguments;
template <class... Types, int (*FUNCTION)(const void*, Types...)>
struct Arguments<FUNCTION> {
    static void* call(void*, void* const* objects, intptr_t count) {
        return answer(count == sizeof...(Types), [&] { return apply(objects, std::index_sequence_for<Types...>()); });
    }

   private:
    template <std::size_t... I>
    static int apply(void* const* objects, std::index_sequence<I...>) {
        const std::tuple<Types...> values{value_of<Types>(objects[I])...};
        return python.exception() ? qkv::OTHER : FUNCTION(&python, std::get<I>(values)...);
    }
};

// The tensors of a step, then its numbers in bytes.
void* layer_step(void*, void* const* objects, intptr_t count) {
    const int tensors = qkv_layer_step_size();
    return answer(count == tensors + 1, [&] {
        const char* const numbers = python.as_bytes(objects[tensors]);
        return numbers ? qkv_layer_step(&python, objects, numbers) : (int)qkv::OTHER;
    });
}

// The tensors of decoder layers, one after another, then their numbers in bytes.
void* decoder_layers(void*, void* const* objects, intptr_t count) {
    const int tensors = qkv_layer_step_size() + qkv_block_size();
    return answer(count % tensors == 1, [&] {
        const char* const numbers = python.as_bytes(objects[count - 1]);
        return numbers ? qkv_decoder_layers(&python, (int)(count / tensors), objects, numbers) : 0;
    });
}

Method methods[] = {
    {"fast_forward", Arguments<qkv_fast_forward>::call},
    {"fast_project", Arguments<qkv_fast_project>::call},
    {"fast_gated_mlp", Arguments<qkv_fast_gated_mlp>::call},
    {"fast_rms_norm", Arguments<qkv_fast_rms_norm>::call},
    {"append", Arguments<qkv_append>::call},
    {"append_pages", Arguments<qkv_append_pages>::call},
    {"fast_rotate", Arguments<qkv_fast_rotate>::call},
    {"layer_step", layer_step},
    {"decoder_layers", decoder_layers},
    {nullptr, nullptr},
};

}  // namespace

// Definitions of methods for PyCFunction_NewEx, up to one without a name. They use a copy of the interpreter.
QKV_EXPORT void* qkv_methods(const void* interpreter) {
    python = *(const qkv::Interpreter*)interpreter;
    return methods;
}
