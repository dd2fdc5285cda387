# Iterations by segment: one program that keeps its models in memory and makes the evaluations of its iterations, too.


# Its record is the only output, so that a segment that fails loses none of its iterations.
rule iterate:
    input:
        before=lambda w: needed(files.before_segment(plan(w), int(w.step))),
        outdated=lambda w: files.outdated_record(plan(w), int(w.step)),
        vision=vision_tokenizer,
        prompts=all_prompts,
        evaluated=lambda w: ancient(files.evaluations(plan(w), plan(w).evaluations)),
    output:
        "{run}/segments/{step}.json",
    log:
        "{run}/logs/iterate/{step}.log",
    benchmark:
        "{run}/benchmarks/iterate/{step}.tsv"
    threads: lambda w: need.segment_threads(settings_of(w))
    resources:
        gpu=lambda w: need.segment_gpus(settings_of(w)),
    shell:
        "earl iterate --run {wildcards.run:q} --to {wildcards.step} 2>&1 | tee {log:q}"


rule outdated_record:
    output:
        temp(touch("{run}/segments/{step}.outdated")),
