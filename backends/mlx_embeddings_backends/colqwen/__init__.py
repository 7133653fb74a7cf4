"""What ColQwen2.5 is on every backend: its checkpoints, its inputs, its positions. Needs neither torch nor mlx."""
