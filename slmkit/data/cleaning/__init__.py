"""What a real corpus needs before it is tokenized: copies, near-copies, odd texts and evaluation text left out."""
