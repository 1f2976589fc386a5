"""The claims of the paper in a world: arms, cells, results, comparisons, verdicts."""
