# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""`make fuzz`: random calls of the ops, guided by the coverage of the C++ code."""
