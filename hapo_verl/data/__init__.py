"""Tools that write data sets with demonstrations: verl's parquet files plus one column, `demonstration`.

python -m hapo_verl.data gsm8k --input train.jsonl --output data/gsm8k
python -m hapo_verl.data demonstrations --input openr1.parquet --output data/openr1/train.parquet --tokenizer ...
"""
