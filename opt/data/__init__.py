"""What a batch is: files and the Hub -> texts -> tokens -> batches."""
