# SPDX-License-Identifier: Apache-2.0
"""L2. Running a user's model: its sites and their layout, many draws at once, its log joint, its priors."""
