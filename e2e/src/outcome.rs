//! [`Result`] and the macros of the tests: what a check says when it does not hold.
//!
//! A failure is a sentence for a reader. No type is ever matched on, so no enum.

/// What a test, the demo or the bench ends with.
pub type Result<T = ()> = std::result::Result<T, Failure>;

/// Why, in words; with the chain of causes flattened behind it.
#[derive(Debug)]
pub struct Failure(pub String);

impl Failure {
    /// The same failure with what was being done in front of it.
    pub fn during(self, what: impl std::fmt::Display) -> Self {
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

/// Adds what was being done to an error.
pub trait During<T> {
    /// `what: error`.
    fn during(self, what: impl std::fmt::Display) -> Result<T>;
}

impl<T, E: Into<Failure>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|e| e.into().during(what))
    }
}

/// Ends the function with a [`Failure`] in these words.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::outcome::Failure(format!($($arg)*))) };
}

/// Ends the function with a [`Failure`] in these words unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => {{
        let holds: bool = $cond;
        if !holds { $crate::bail!($($arg)*); }
    }};
}

/// Ends the function unless both are equal, and shows them.
#[macro_export]
macro_rules! same {
    ($left:expr, $right:expr, $($arg:tt)*) => {{
        let (left, right) = (&$left, &$right);
        if *left != *right { $crate::bail!("{}: {left:?} is not {right:?}", format!($($arg)*)); }
    }};
}
