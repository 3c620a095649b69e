"""Shapes of data sets beside folders of images: tables, Parquet files, tar shards. One manifest serves them all."""
