// Where the pairs of the published data sets stand, for an entry of raw_datasets:
//
//   raw_datasets: { omniedit: (import 'data/columns.libsonnet').omniedit }
//   raw_datasets: { omniedit: (import 'data/columns.libsonnet').omniedit { path: '/data/OmniEdit/data/train-*.parquet' } }
//
// The first downloads the files from the hub. Names of columns come from the card of each data set, unless a comment
// says otherwise; the files themselves were not at hand. A name that a file does not have stops tokenising before
// anything loads, and a filter that no row passes does, too; both say what there is.
local hub(repository, files) = 'hf://datasets/%s/%s' % [repository, files];
{
  // Card: omni_edit_id, task, src_img, edited_img, edited_prompt_list; 1,202,797 rows in train. The list holds one
  // instruction in several wordings. Images alone would take hundreds of gigabytes.
  omniedit: {
    source: 'parquet',
    path: hub('TIGER-Lab/OmniEdit-Filtered-1.2M', 'data/train-*.parquet'),
    columns: {
      example_id: 'omni_edit_id',
      task: 'task',
      instruction: 'edited_prompt_list[0]',
      original: 'src_img',
      edited: 'edited_img',
    },
    keep_images: false,
  },

  // Card: source_img, target_img, instruction; 8,807 rows in train. img_id repeats over the turns of a session, so rows
  // are numbered instead.
  magic_brush: {
    source: 'parquet',
    path: hub('osunlp/MagicBrush', 'data/train-*.parquet'),
    columns: { example_id: null, task: null, instruction: 'instruction', original: 'source_img', edited: 'target_img' },
  },

  // Card: one table of 169,180 rows with input, output, instruction, source. That source is `ag` for action-genome, the
  // paper's code says; that it is `kubric` for Kubric is a guess.
  local aurora = {
    source: 'parquet',
    path: hub('McGill-NLP/AURORA', 'data/train-*.parquet'),
    columns: { example_id: null, task: 'source', instruction: 'instruction', original: 'input', edited: 'output' },
  },
  aurora_ag: aurora { filter: { source: 'ag' } },
  aurora_kubric: aurora { filter: { source: 'kubric' } },

  // Something-Something-v2: its licence makes everyone cut the frames themselves, so there is no path. A guess: in the
  // form of AURORA, whose code cuts them.
  ss2: {
    source: 'parquet',
    columns: { example_id: null, task: null, instruction: 'instruction', original: 'input', edited: 'output' },
  },

  // Card: Arrow files, an image a row, with image_id, image, caption, bounding_boxes, source_image_id and category; the
  // last two are empty for originals. There is no instruction: the caption of the edited image stands in for it. The
  // authors' own pairs (escher-vismin, below) have instructions.
  vismin: {
    source: 'parquet',
    path: hub('mair-lab/vismin', '*.arrow'),
    columns: { example_id: 'image_id', task: 'category', instruction: 'caption', original: 'image', edited: 'image' },
    pairing: { image_id: 'image_id', original_id: 'source_image_id' },
  },

  // Card: 5,751 rows with these columns and masks.
  'human-edit': {
    source: 'parquet',
    path: hub('BryanW/HumanEdit', 'data/train-*.parquet'),
    columns: {
      example_id: 'IMAGE_ID',
      task: 'EDITING_TYPE',
      instruction: 'EDITING_INSTRUCTION',
      original: 'INPUT_IMG',
      edited: 'OUTPUT_IMG',
    },
  },

  // The authors' pairs, with reasoning. Card: id, source_image, edited_image, edit_instruction, thinking, task. The
  // paper's tokenising script takes the columns of `escher_reasoning` in this order; where files have all three:
  //   .['escher-vismin'] { columns+: { reasoning: presets.escher_reasoning } }
  escher_reasoning:: ['source_image_grounding_information', 'conditioning_information', 'thinking'],
  local escher(name) = {
    source: 'parquet',
    path: hub('Image-editing/' + name, '*train*.parquet'),
    columns: {
      example_id: 'id',
      task: 'task',
      instruction: 'edit_instruction',
      original: 'source_image',
      edited: 'edited_image',
      reasoning: ['thinking'],
    },
  },
  'escher-omniedit': escher('escher-omniedit') { keep_images: false },
  'escher-magicbrush': escher('escher-magicbrush'),
  'escher-aurora-ag': escher('escher-aurora-ag'),
  'escher-aurora-kubric': escher('escher-aurora-kubric'),
  'escher-ss2': escher('escher-ss2'),
  'escher-vismin': escher('escher-vismin'),
  'escher-human-edit': escher('escher-human-edit'),
}
