// Simple edits: OmniEdit.
local mixing = (import 'mixing.libsonnet').simple;
{
  train_paths_file: [$.dataset(row[0]) for row in mixing],
  coefficients: [row[1] for row in mixing],
}
