//! Where does one structured field item (RFC 9651) end and the next begin?
//!
//! A cursor over a field line's bytes: exact reads for what is our own, skips for what is not. Nothing here recurses,
//! allocates or goes back, so a line costs its length.

/// The text is not what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// A cursor over bytes that came from the network.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scanner<'a> {
    rest: &'a [u8],
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self { rest: text }
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }

    /// What was read since `start`, an earlier [`Self::rest`].
    pub(super) fn since(&self, start: &'a [u8]) -> &'a [u8] {
        start.get(..start.len() - self.rest.len()).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    /// Reads exactly `text`.
    pub(super) fn expect(&mut self, text: &[u8]) -> Result<(), Malformed> {
        self.rest = self.rest.strip_prefix(text).ok_or(Malformed)?;
        Ok(())
    }

    /// Reads `text` if it is there.
    pub(super) fn eat(&mut self, text: &[u8]) -> bool {
        self.expect(text).is_ok()
    }

    pub(super) fn take_while(&mut self, fits: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.rest.iter().position(|byte| !fits(*byte)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at_checked(end).unwrap_or((self.rest, &[]));
        self.rest = rest;
        taken
    }

    /// A decimal number as we write it: no sign, no leading zero.
    pub(super) fn number(&mut self) -> Result<u64, Malformed> {
        let digits = self.take_while(|byte| byte.is_ascii_digit());
        if digits.is_empty() || (digits.len() > 1 && digits.starts_with(b"0")) {
            return Err(Malformed);
        }
        let number = |sum: u64, digit: &u8| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0'));
        digits.iter().try_fold(0, number).ok_or(Malformed)
    }

    /// The inside of a string that needs no escapes, up to and with its closing quote.
    pub(super) fn until_quote(&mut self) -> Result<&'a [u8], Malformed> {
        let text = self.take_while(|byte| byte != b'"' && byte != b'\\' && is_printable(byte));
        self.expect(b"\"")?;
        Ok(text)
    }

    pub(super) fn skip_spaces(&mut self) {
        self.take_while(|byte| byte == b' ');
    }

    pub(super) fn skip_optional_whitespace(&mut self) {
        self.take_while(|byte| byte == b' ' || byte == b'\t');
    }

    pub(super) fn key(&mut self) -> Result<&'a [u8], Malformed> {
        if !self.peek().is_some_and(|first| first.is_ascii_lowercase() || first == b'*') {
            return Err(Malformed);
        }
        Ok(self.take_while(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-' | b'.' | b'*')
        }))
    }

    /// `;key=value;key…`; each parameter's key and raw value go to `see`.
    pub(super) fn skip_parameters(
        &mut self,
        mut see: impl FnMut(&'a [u8], &'a [u8]),
    ) -> Result<(), Malformed> {
        while self.eat(b";") {
            self.skip_spaces();
            let key = self.key()?;
            let mut value = &b""[..];
            if self.eat(b"=") {
                let start = self.rest;
                self.skip_bare_item()?;
                value = self.since(start);
            }
            see(key, value);
        }
        Ok(())
    }

    pub(super) fn skip_item(&mut self) -> Result<(), Malformed> {
        self.skip_bare_item()?;
        self.skip_parameters(|_, _| ())
    }

    /// `(item item …)`, without the parameters that may follow it.
    pub(super) fn skip_inner_list(&mut self) -> Result<(), Malformed> {
        self.expect(b"(")?;
        loop {
            self.skip_spaces();
            if self.eat(b")") {
                return Ok(());
            }
            self.skip_item()?;
            if !matches!(self.peek(), Some(b' ' | b')')) {
                return Err(Malformed);
            }
        }
    }

    pub(super) fn skip_bare_item(&mut self) -> Result<(), Malformed> {
        match self.peek() {
            Some(b'"') => self.skip_string(),
            Some(b':') => self.skip_bytes(),
            Some(b'?') => {
                self.expect(b"?")?;
                if self.eat(b"0") { Ok(()) } else { self.expect(b"1") }
            }
            Some(b'@') => {
                self.expect(b"@")?;
                self.skip_number()
            }
            Some(b'%') => self.skip_display_string(),
            Some(first) if first == b'-' || first.is_ascii_digit() => self.skip_number(),
            Some(first) if first == b'*' || first.is_ascii_alphabetic() => {
                self.take_while(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:/".contains(&byte));
                Ok(())
            }
            Some(_) | None => Err(Malformed),
        }
    }

    fn skip_string(&mut self) -> Result<(), Malformed> {
        self.expect(b"\"")?;
        loop {
            self.take_while(|byte| byte != b'"' && byte != b'\\' && is_printable(byte));
            if self.eat(b"\"") {
                return Ok(());
            }
            if !self.eat(br#"\""#) {
                self.expect(br"\\")?;
            }
        }
    }

    fn skip_display_string(&mut self) -> Result<(), Malformed> {
        self.expect(b"%\"")?;
        loop {
            self.take_while(|byte| byte != b'"' && byte != b'%' && is_printable(byte));
            if self.eat(b"\"") {
                return Ok(());
            }
            self.expect(b"%")?;
            for _ in 0..2 {
                let digit =
                    self.rest.split_first().filter(|(digit, _)| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
                self.rest = digit.ok_or(Malformed)?.1;
            }
        }
    }

    fn skip_bytes(&mut self) -> Result<(), Malformed> {
        self.expect(b":")?;
        self.take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='));
        self.expect(b":")
    }

    /// An integer of up to 15 digits, or a decimal of up to 12 and 3.
    fn skip_number(&mut self) -> Result<(), Malformed> {
        self.eat(b"-");
        let whole = self.take_while(|byte| byte.is_ascii_digit()).len();
        if !self.eat(b".") {
            return if (1..=15).contains(&whole) { Ok(()) } else { Err(Malformed) };
        }
        let fraction = self.take_while(|byte| byte.is_ascii_digit()).len();
        if (1..=12).contains(&whole) && (1..=3).contains(&fraction) { Ok(()) } else { Err(Malformed) }
    }
}

fn is_printable(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte)
}
