// Simple and complex edits; OmniEdit is cut down to the size of one of the others.
local simple = import 'simple.libsonnet';
local complex = import 'complex.libsonnet';
{
  train_paths_file: simple.train_paths_file + complex.train_paths_file,
  coefficients: [0.13] + complex.coefficients,
}
