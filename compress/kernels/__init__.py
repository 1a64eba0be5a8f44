"""Op contracts: schema, reference body, fake, and the compiled library that does the work where it is there."""
