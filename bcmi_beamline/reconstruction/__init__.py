"""Phase retrieval: ptychography, modulation (BCMI), conventional (BCDI), metrics."""
