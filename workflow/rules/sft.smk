# Supervised fine-tuning: the policy that RL, or another fine-tuning, starts from.


rule sft:
    input:
        lambda w: made_from(w, "sft"),
    output:
        "{shared}/sft/{name}/manifest.json",
    log:
        "{shared}/logs/sft/{name}.log",
    benchmark:
        "{shared}/benchmarks/sft/{name}.tsv"
    threads: sft_threads
    params:
        earl=launched("sft"),
        config=lambda w: user_of(w, "sft").run.config,
        sft=lambda w: shared_stage(w, "sft").name,
        out=subpath(output[0], parent=True),
    shell:
        "{params.earl} sft --config {params.config} --name {params.sft} --out {params.out} 2>&1 | tee {log}"
