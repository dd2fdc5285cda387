// Simple edits: OmniEdit.
{
  train_paths_file: [
    std.extVar('APP__DATA_DIR') + '/earl-datasets/omniedit/train/list/tokenized_datalist.json',
  ],
  coefficients: [1.0],
}
