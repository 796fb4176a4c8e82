# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The parts of `make soak`: each repeats one kind of work until its time is over."""
