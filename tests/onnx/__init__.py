# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
