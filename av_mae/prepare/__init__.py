"""From a data set's clips to a prepared set: decoding in processes of their own, shards, report."""
