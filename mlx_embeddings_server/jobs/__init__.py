"""Re-embedding as jobs: what is to be done is on the disk, and done once, by whichever worker takes it."""
