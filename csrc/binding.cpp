// Python bindings, and nothing else.
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "hebbian.h"
#if defined(LOCALSGD_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace {

using namespace localsgd;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor py_correlation(Tensor x, OptionalTensor z, Tensor weight, OptionalTensor bias, Ints stride, Padding padding,
                      Ints dilation, int64_t groups, std::string padding_mode, bool z_is_output, const std::string& algorithm,
                      bool benchmark) {
    return correlation({x, z, weight, bias, stride, padding, dilation, groups, padding_mode, z_is_output}, algorithm,
                       benchmark);
}

void py_hebbian_update_(Tensor weight, Tensor x, OptionalTensor z, Lr lr, OptionalTensor bias, Ints stride, Padding padding,
                        Ints dilation, int64_t groups, std::string padding_mode, bool z_is_output, bool normalize,
                        const std::string& algorithm, OptionalTensor skipped, bool benchmark) {
    hebbian_update_({x, z, weight, bias, stride, padding, dilation, groups, padding_mode, z_is_output}, lr, normalize,
                    algorithm, skipped, benchmark);
}

Tensor py_gram_sums(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Padding padding, Ints dilation, int64_t groups,
                    std::string padding_mode) {
    return gram_sums({x, std::nullopt, weight, bias, stride, padding, dilation, groups, padding_mode, true});
}

Plan py_plan(Tensor x, OptionalTensor z, Tensor weight, OptionalTensor bias, Ints stride, Padding padding, Ints dilation,
             int64_t groups, std::string padding_mode, bool z_is_output, bool benchmark) {
    return plan({x, z, weight, bias, stride, padding, dilation, groups, padding_mode, z_is_output}, benchmark);
}

// Why kernels cannot run on a device, or "".
std::string unavailable(const c10::Device& device) {
#if defined(LOCALSGD_WITH_CUDA)
    if (device.type() == cuda::kDeviceType) return cuda::unavailable(device);
#endif
    if (device.is_cpu()) return "";
    const std::string type = c10::DeviceTypeName(device.type(), true);
    return "no kernel is built for " + type + " devices" + (type == "cuda" ? " (LOCALSGD_CUDA=1 says what is missing)" : "");
}

} // namespace

PYBIND11_MODULE(_C, m) {
    namespace py = pybind11;
    using torch::wrap_pybind_function_no_gil; // translates c10 errors to ValueError, TypeError, RuntimeError

    // Local to the module: tests load a second build of it, whose device is emulated.
    py::class_<Candidate>(m, "Candidate", py::module_local())
        .def_property_readonly("algorithm", [](const Candidate& c) { return algorithm_name(c.algorithm); })
        .def_readonly("eligible", &Candidate::eligible)
        .def_readonly("automatic", &Candidate::automatic)
        .def_readonly("why_not", &Candidate::why_not)
        .def_readonly("estimated_us", &Candidate::estimated_us)
        .def_readonly("configuration", &Candidate::configuration)
        .def_property_readonly(
            "measured_us", [](const Candidate& c) { return c.measured_us < 0 ? std::nullopt : std::optional(c.measured_us); });
    py::class_<Plan>(m, "Plan", py::module_local())
        .def_property_readonly("geometry", [](const Plan& p) { return describe(p.query.geometry); })
        .def_property_readonly("channels_last", [](const Plan& p) { return p.query.channels_last; })
        .def_readonly("candidates", &Plan::candidates)
        .def_property_readonly("pick", [](const Plan& p) { return algorithm_name(p.pick); })
        .def_readonly("reason", &Plan::reason);

    m.def("correlation", wrap_pybind_function_no_gil(py_correlation));
    m.def("hebbian_update_", wrap_pybind_function_no_gil(py_hebbian_update_));
    m.def("apply_update_", wrap_pybind_function_no_gil(apply_update_));
    m.def("gram_sums", wrap_pybind_function_no_gil(py_gram_sums));
    m.def("correlation_of_gram_sums", wrap_pybind_function_no_gil(correlation_of_gram_sums));
    m.def("plan", wrap_pybind_function_no_gil(py_plan));
    m.def("unavailable", wrap_pybind_function_no_gil(unavailable));
#if defined(LOCALSGD_WITH_CUDA)
    m.attr("gpu") = c10::DeviceTypeName(cuda::kDeviceType, true); // the devices whose kernels do not take float64
#else
    m.attr("gpu") = py::none();
#endif
}
