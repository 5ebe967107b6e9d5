DROP TABLE gold_scores;
DROP TABLE gold_exposures;
DROP TABLE exports;
