// Complex edits, mixed as in the paper: each data set comes to about 50,000 examples.
local folder = std.extVar('APP__DATA_DIR') + '/earl-datasets/';
local mixing = [
  ['magic_brush', 6],
  ['aurora_ag', 6],  // AURORA, action-genome
  ['aurora_kubric', 0.7],
  ['ss2', 1.55],  // Something-Something-v2
  ['vismin', 3.7],
  ['human-edit', 11],
];
{
  train_paths_file: [folder + row[0] + '/train/list/tokenized_datalist.json' for row in mixing],
  coefficients: [row[1] for row in mixing],
}
