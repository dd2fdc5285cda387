# Supervised fine-tuning: the policy that RL starts from.


rule sft:
    input:
        lambda w: made_from(w, "sft"),
    output:
        "{shared}/sft/{name}/manifest.json",
    log:
        "{shared}/logs/sft/{name}.log",
    benchmark:
        "{shared}/benchmarks/sft/{name}.tsv"
    threads: lambda w: user_of(w, "sft").config.cpu_threads
    params:
        earl=launched("sft"),
        config=lambda w: user_of(w, "sft").run.config,
        out=subpath(output[0], parent=True),
    shell:
        "{params.earl} sft --config {params.config} --out {params.out} 2>&1 | tee {log}"
