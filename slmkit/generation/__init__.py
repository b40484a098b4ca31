"""From logits to text: sampling, the generator, streaming, conversations. The names are loaded when first used."""
