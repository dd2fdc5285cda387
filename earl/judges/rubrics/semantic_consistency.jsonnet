// VIEScore's semantic consistency (Ku et al. 2023, arXiv:2312.14867), in words of our own.
{
  name: 'semantic consistency',
  images: ['original', 'edited'],
  scores: ['edit_success', 'overedit'],
  lowest: 0,
  highest: 10,
  prompt: |||
    You check the work of an image editor. It was given a picture and an instruction, and it returned an edited picture.

    The picture before the edit:
    {original}
    The picture after the edit:
    {edited}
    The instruction was: {instruction}

    Compare the two pictures and give two whole numbers.

    edit_success, from 0 to 10: was the instruction carried out? 0 means that nothing of it can be seen in the edited
    picture, 5 that about half of it was done, 10 that all of it was done exactly as it says.

    overedit, from 0 to 10: was everything else left alone? 0 means that the edited picture has nothing in common with
    the one before, 5 that several things changed that the instruction does not speak of, 10 that only what the
    instruction asks for has changed. A picture that was not changed at all gets 10 here and 0 for edit_success.

    Judge only what you see. Say in one or two short sentences what was done and what else has changed, then give the
    numbers, as JSON: {"reasoning": "...", "edit_success": number, "overedit": number}
  |||,
}
