"""Compare rollouts with the futures that truly follow under their actions and under others."""
