// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// The table of contents: every op of the library. Kernels register themselves
// in cpu/ and cuda/; shapes for tracing, gradients and documentation are in
// dcn_plugin/ops.

#include <Python.h>

#include <torch/library.h>

TORCH_LIBRARY(dcn_plugin, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "Tensor? mask) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Gradients of (input, offset, weight, bias, mask); empty where not wanted.
  m.def(
      "_deform_conv2d_backward(Tensor grad_output, Tensor input, "
      "Tensor offset, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, Tensor? mask, bool[5] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

// `import dcn_plugin._C` loads this library and so registers the ops; the
// module itself is empty.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "Registers the ops of dcn_plugin with PyTorch.",
      -1,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      nullptr};
  return PyModule_Create(&module);
}
