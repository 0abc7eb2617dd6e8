//! [`Failure`], [`Result`] and the assertion macros of the tests.
//!
//! A failure is a message for a reader. Callers never match on its type, so there is no enum.

/// Result of a test, the demo or the bench.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

/// Message that includes the chain of causes.
#[derive(Debug)]
pub(crate) struct Failure(pub String);

impl Failure {
    /// Prefixes the failure with a description of the operation.
    pub(crate) fn during(self, what: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(boxlite_sys::report::report(&error))
    }
}

/// Adds a description of the operation to an error.
pub(crate) trait During<T> {
    /// Prefixes the error with the operation.
    fn during(self, what: impl std::fmt::Display) -> Result<T>;
}

impl<T, E: Into<Failure>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|e| e.into().during(what))
    }
}

/// Returns a [`Failure`] with this message from the function.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::failure::Failure(format!($($arg)*))) };
}

/// Returns a [`Failure`] with this message from the function unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => {{
        let holds: bool = $cond;
        if !holds { $crate::bail!($($arg)*); }
    }};
}

/// Returns a [`Failure`] that shows both values unless they are equal.
#[macro_export]
macro_rules! same {
    ($left:expr, $right:expr, $($arg:tt)*) => {{
        let (left, right) = (&$left, &$right);
        if *left != *right { $crate::bail!("{}: {left:?} is not {right:?}", format!($($arg)*)); }
    }};
}
