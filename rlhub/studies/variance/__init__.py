"""The variance laboratory behind `rlhub bench variance`: `estimates` has the formulas, `laboratory` makes and averages the draws, `measure`
runs it over policies and writes the results, `plot` draws them."""
