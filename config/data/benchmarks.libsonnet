// Where the columns of the six benchmarks stand, by the names of the published table. EmuEdit, AURORA-Bench and I2EBench
// have no edited image: they can be prompted with and judged without the truth, so not by the ground score. As for the
// training data (columns.libsonnet), a name that a file does not have stops tokenising, and says which ones there are.
local benchmark(original, edited, instruction, task) = {
  source: 'parquet',
  columns: {
    example_id: null,
    original: original,
    edited: edited,
    instruction: instruction,
    task: task,
    reasoning: null,
  },
};
{
  omniedit: benchmark('src_img', 'edited_img', 'edited_prompt_list[0]', 'task'),  // the dev split
  emuedit: benchmark('image', null, 'instruction', 'task'),
  aurora: benchmark('input', null, 'instruction', 'source'),
  magicbrush: benchmark('input', 'output', 'instruction', null),
  vismin: benchmark('source_image', 'edited_image', 'edit_instruction', 'task'),
  i2ebench: benchmark('image', null, 'instruction', 'task'),
}
