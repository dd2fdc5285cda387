# Supervised fine-tuning: the policy that RL, or another fine-tuning, starts from.


rule sft:
    input:
        lambda w: SHARED.at(w, "sft").inputs,
    output:
        "{shared}/sft/{name}/manifest.json",
    log:
        "{shared}/logs/sft/{name}.log",
    benchmark:
        "{shared}/benchmarks/sft/{name}.tsv"
    threads: lambda w: need.training_threads(SHARED.at(w, "sft").config)
    resources:
        gpu=lambda w: need.training_gpus(SHARED.at(w, "sft").config),
    params:
        config=lambda w: SHARED.at(w, "sft").config_file,
        sft=lambda w: SHARED.at(w, "sft").name,
        out=subpath(output[0], parent=True),
    shell:
        "earl sft --config {params.config:q} --name {params.sft} --out {params.out:q} 2>&1 | tee {log:q}"
