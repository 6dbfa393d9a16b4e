"""All that the method does not need: options, run folders, data sets on disk, tables, figures, benchmarks."""
