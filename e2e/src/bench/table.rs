//! Samples of a measurement, and the statistics that the tables print.

use std::time::Duration;

/// Samples in milliseconds, sorted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    /// Creates a series from samples in any order.
    pub(crate) fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// Returns the number of samples.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the median; 0 without samples.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(50)
    }

    /// Returns a percentile, the smallest sample with at least `percent` of all at or below it; 0 without samples.
    pub(crate) fn quantile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    /// Prints a row with median, extremes and the ratio of the median to `unit`.
    pub(crate) fn row(&self, name: &str, unit: f64) {
        let (first, last) = (self.quantile(0), self.quantile(100));
        let median = self.median();
        println!(
            "{name:<44} {median:>9.1} {first:>9.1} {last:>9.1} {:>8.3} {:>4}",
            median / unit,
            self.len()
        );
    }
}

/// Returns a duration in milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::Series;

    #[test]
    fn quantile_returns_samples() {
        let series = Series::new((1..=10).rev().map(f64::from).collect());
        assert_eq!((series.median(), series.quantile(99)), (5.0, 10.0));
        assert_eq!((series.quantile(0), series.quantile(100)), (1.0, 10.0));
        assert_eq!(Series::default().median(), 0.0);
    }
}
