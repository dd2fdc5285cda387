// Complex edits.
local mixing = (import 'mixing.libsonnet').complex;
{
  train_paths_file: [$.dataset(row[0]) for row in mixing],
  coefficients: [row[1] for row in mixing],
}
