"""Models on MLX: Apple silicon, and for tests or NVIDIA cards on Linux."""
